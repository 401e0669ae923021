"""A short exchange between machines, before a run starts on them: whether they reach each other at all, and how fast."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from cpt_mega.engine.host import has_gpu
from cpt_mega.errors import FaultError

_VALUES = 16 * 2**20


def exchange(address: str, rank: int, world: int, timeout_s: float) -> float:
    """All-reduces 64 MiB over one process a machine; returns the bytes a second that each sent and received.

    Args:
        address: ``host:port`` of rank 0.

    Raises FaultError when the others are not reached in time, or the sum is wrong.
    """
    backend, device = ("nccl", "cuda") if has_gpu() else ("gloo", "cpu")
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timeout)
        values = torch.full((_VALUES,), float(rank + 1), device=device)
        dist.all_reduce(values[:1])  # connections are made at the first use
        float(values[0])  # a device has done what it was told when a value comes back
        begin = time.monotonic()
        dist.all_reduce(values[1:])
        least, most = (float(value) for value in values[1:].aminmax())
        seconds = time.monotonic() - begin
    except (RuntimeError, ValueError) as error:  # torch.distributed's own are all kinds of the first
        words = " ".join(str(error).split())[:200]
        raise FaultError(f"{world} machines do not reach each other at {address} ({words})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    expected = world * (world + 1) / 2
    if (least, most) != (expected, expected):
        raise FaultError(f"a sum over {world} machines is wrong: {least} to {most} instead of {expected}")
    return 2 * (world - 1) / world * 4 * (_VALUES - 1) / seconds

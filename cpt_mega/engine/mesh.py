"""The processes of a run and the groups they form: tensor, pipeline and data parallel, through megatron-core."""

import os
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from cpt_mega.config.schema import ParallelOptions
from cpt_mega.engine.host import CPU, has_gpu
from cpt_mega.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How many ways each kind of parallelism cuts; ``vpp`` is the number of chunks of a pipeline stage."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int

    @classmethod
    def of(cls, parallel: ParallelOptions, world: int) -> "Layout":
        """Raises InputError when the processes do not divide into whole replicas."""
        p = parallel
        if world % p.model_size:
            raise InputError(
                "parallel",
                f"tp {p.tp} x pp {p.pp} x cp {p.cp} on {world} processes",
                f"start a multiple of {p.model_size} processes (bash launch/torchrun.sh CONFIG), or change parallel.*",
            )
        return cls(p.tp, p.pp, p.vpp, p.cp, world // p.model_size)

    @property
    def name(self) -> str:
        """As people write it, ``TP 2 x PP 1 x DP 1``; chunks and context parallelism only where there are any."""
        chunks = f" (VPP {self.vpp})" if self.vpp > 1 else ""
        context = f" x CP {self.cp}" if self.cp > 1 else ""
        return f"TP {self.tp} x PP {self.pp}{chunks}{context} x DP {self.dp}"


@dataclass(frozen=True)
class Mesh:
    """The layout, this process's place in it, and its groups. Made by ``start_mesh``."""

    layout: Layout
    rank: int
    world: int
    groups: ProcessGroupCollection
    control: dist.ProcessGroup  # gloo over all ranks: small host-side agreements, never the step's tensors

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def pp(self) -> int:
        return self.layout.pp

    @property
    def cp(self) -> int:
        return self.layout.cp

    @property
    def dp(self) -> int:
        return self.layout.dp

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.pp - 1

    @property
    def is_main(self) -> bool:
        """The one process that writes logs and folders."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else CPU

    def set_timeout(self, seconds: float) -> None:
        """How long a collective of this run may wait for another process from now on; longer is an error."""
        found = (getattr(self.groups, field.name, None) for field in fields(self.groups))
        groups = [group for group in found if isinstance(group, dist.ProcessGroup) and group.rank() >= 0]
        for group in {id(g): g for g in (*groups, self.control, dist.group.WORLD)}.values():
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def agree_max(self, values: list[int]) -> list[int]:
        """Element-wise maximum of small integers over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value: object) -> list | None:
        """Every rank's picklable value, in rank order, on rank 0; None elsewhere."""
        found: list | None = [None] * self.world if self.is_main else None
        dist.gather_object(value, found, dst=0, group=self.control)
        return found

    def share(self, value: object) -> object:
        """Rank 0's picklable value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_mesh(parallel: ParallelOptions, seed: int, timeout_s: float = 600.0) -> Mesh:
    """Starts torch.distributed (from torchrun's environment, or one process) and core's groups, and seeds this process.

    Raises InputError when the layout does not divide the processes.
    """
    world = world_size()
    layout = Layout.of(parallel, world)
    _start_distributed(world, timedelta(seconds=timeout_s))
    start_groups(parallel, timeout_s)
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # as Megatron-LM has it
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    control = dist.new_group(backend="gloo") if has_gpu() else dist.group.WORLD
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(layout, dist.get_rank(), world, groups, control)


def start_groups(parallel: ParallelOptions, timeout_s: float = 600.0) -> None:
    """Core's process groups over the processes of torch.distributed."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_s / 60,
    )


def stop_mesh() -> None:
    """Takes all groups down, torch's and core's; their threads end when nothing refers to the mesh and its engines."""
    RotaryEmbedding.forward.cache_clear()  # a cache on a method: it holds the module, and that its process group
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _start_distributed(world: int, timeout: timedelta) -> None:
    if has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if has_gpu() else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # one process without torchrun needs no network
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

"""What takes the memory of a process, and what to change when it does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpt_mega.config.schema import Config
from cpt_mega.engine.host import has_gpu
from cpt_mega.engine.step import Engine
from cpt_mega.errors import FaultError

_GIB = 1024**3
_CPU_WORDS = "can't allocate memory"


def memory_parts(engine: Engine) -> dict[str, int]:
    """Bytes of this process by part: what the engine holds between steps, and the most that a step took beside it."""
    parts = {
        "weights": sum(p.numel() * p.element_size() for chunk in engine.core_chunks for p in chunk.parameters()),
        "gradients": sum(
            buffer.grad_data.numel() * buffer.grad_data.element_size()
            for chunk in engine.chunks
            for buffer in chunk.buffers
        ),
        "optimizer": sum(_optimizer_bytes(engine)),
    }
    if has_gpu():
        parts["activations and workspaces"] = max(0, torch.cuda.max_memory_allocated() - sum(parts.values()))
    return parts


@contextmanager
def explained(config: Config, engine: Engine | None = None) -> Iterator[None]:
    """Turns running out of memory into a FaultError that says what took how much and which option to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise FaultError(_sentence(config, engine)) from error
    except RuntimeError as error:
        if _CPU_WORDS not in str(error):
            raise
        raise FaultError(_sentence(config, engine)) from error


def _optimizer_bytes(engine: Engine) -> Iterator[int]:
    """Moments, and master weights where they are not the model's own."""
    model = {id(p) for chunk in engine.core_chunks for p in chunk.parameters()}
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for p in group["params"]:
                is_master = id(p) not in model and engine.core_chunks[0].config.bf16
                yield p.numel() * p.element_size() if is_master else 0
                yield sum(x.numel() * x.element_size() for x in inner.state.get(p, {}).values() if torch.is_tensor(x))


def _sentence(config: Config, engine: Engine | None) -> str:
    if engine is None:
        took = "while the model was being built"
    else:
        took = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in memory_parts(engine).items())
    return f"out of memory: {took}. {_advice(config)}. Nothing was saved after the last checkpoint"


def _advice(config: Config) -> str:
    """The options that take memory down, the cheapest first."""
    train, words = config.train, []
    if train.micro_batch_size > 1:
        words.append("train.micro_batch_size=1")
    if train.recompute != "full":
        words.append("train.recompute=" + ("selective, then full" if train.recompute == "none" else "full"))
    if not train.distributed_optimizer:
        words.append("train.distributed_optimizer=true")
    if config.parallel.tp > 1 and not config.parallel.sp:
        words.append("parallel.sp=true")
    if train.recompute == "full":
        words.append("more parallel.tp, pp or cp")
    return f"Set {'; or '.join(words)}"

"""What worker processes do for tests, through public doors; arguments and results are JSON."""

import gc
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cpt_mega.config import load_config
from cpt_mega.config.load import build_config
from cpt_mega.config.schema import ParallelOptions
from cpt_mega.data.stream import MixedStream
from cpt_mega.engine.context import filled_lengths, gathered_order, rank_positions
from cpt_mega.engine.fast_paths import environment
from cpt_mega.engine.memory import explained
from cpt_mega.engine.mesh import start_mesh, stop_mesh
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.precision import precision_fields
from cpt_mega.engine.replicas import differing_replicas
from cpt_mega.engine.state import load_weights
from cpt_mega.engine.step import Engine
from cpt_mega.errors import FaultError, InputError
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.shape import ModelShape
from cpt_mega.loop.housekeeping import collected_together
from cpt_mega.loop.scoring import score_file
from cpt_mega.loop.session import run_session


def train(config: str, overrides: list[str]) -> list[str]:
    """A whole run, as ``python -m cpt_mega.train`` has it; returns ``[state, reason]``."""
    return list(run_session(load_config(config, overrides), "the same command"))


def score(checkpoint: str, source: str, target: str, overrides: list[str]) -> int:
    """The public scorer."""
    return int(score_file(checkpoint, source, target, overrides))


def transformers_logits(folder: str, ids: list[int]) -> list:
    """Logits of the reference, computed in a process that has the host's stand-ins and a process group."""
    from transformers import AutoModelForCausalLM

    start_mesh(ParallelOptions(), seed=1)
    try:
        model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].tolist()
    finally:
        stop_mesh()


def refusal(shape: dict, world: int, overrides: list[str]) -> str | None:
    """What a layout is refused for, or None."""
    values = {"run": {"dir": "."}, "model": {"checkpoint": "."}, "train": {"tokens": 0}}
    try:
        check_layout(build_config(values, overrides), ModelShape.from_json(shape), world)
    except InputError as error:
        return str(error)
    return None


def context_parts(lengths: list[int], size: int) -> dict:
    """How documents are shared over context-parallel ranks."""
    filled = filled_lengths(lengths, size)
    return {
        "filled": filled,
        "positions": [rank_positions(lengths, size, rank).tolist() for rank in range(size)],
        "order": gathered_order(filled, size).tolist(),
    }


def cuda_environment(parallel: dict, deterministic: bool, capability: list[int]) -> dict:
    """The variables that would be set for CUDA, without their reasons."""
    chosen = environment(ParallelOptions(**parallel), deterministic, tuple(capability))
    return {name: value for name, (value, _) in chosen.items()}


def recipe_in_core(precision: str) -> dict:
    """What core's configuration holds of a precision."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    core = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **precision_fields(precision))
    return {"bf16": core.bf16, "fp8": core.fp8, "fp8_recipe": str(getattr(core.fp8_recipe, "value", core.fp8_recipe))}


def differing_replicas_after_a_flip(config: str, overrides: list[str], rank: int | None, name: str) -> list[str]:
    """What the replica check says of a model in which one rank has one bit of one parameter flipped."""
    options = load_config(config, overrides)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        folder = locate_checkpoint(options.model.checkpoint)
        engine = Engine(options, read_model_info(folder).shape, mesh)
        load_weights(engine, folder)
        if mesh.rank == rank:
            values = dict(engine.core_chunks[0].named_parameters())[name].detach()
            words = values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).view(-1)
            words[len(words) // 2] ^= 1
        return differing_replicas(engine)
    finally:
        stop_mesh()


def memory_sentence(config: str, overrides: list[str]) -> str:
    """What is said when a training step runs out of memory."""
    options = load_config(config, overrides)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        engine = Engine(options, read_model_info(locate_checkpoint(options.model.checkpoint)).shape, mesh)
        with explained(options, engine):
            raise torch.OutOfMemoryError("CUDA out of memory")
    except FaultError as error:
        return str(error)
    finally:
        stop_mesh()


def swiglu_as_autograd_has_it() -> dict[str, bool]:
    """Whether core's SwiGLU on the host gives the bits of the plain formula: output, gradient."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    torch.manual_seed(1)
    values, grad = torch.randn(7, 1, 22), torch.randn(7, 1, 11)
    plain, fused = (values.clone().requires_grad_() for _ in range(2))
    gate, up = plain.chunk(2, dim=-1)
    expected, found = torch.nn.functional.silu(gate) * up, bias_swiglu_impl(fused, None)
    expected.backward(grad)
    found.backward(grad)
    return {"output": torch.equal(expected, found), "gradient": torch.equal(plain.grad, fused.grad)}


def adam_beside_torchs(steps: int) -> float:
    """How far HostAdam gets from torch's AdamW in some steps, at most (absolute)."""
    from cpt_mega.engine.host_kernels import HostAdam

    torch.manual_seed(1)
    start, options = torch.randn(50), {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(ours, HostAdam([ours], **options)), (theirs, torch.optim.AdamW([theirs], **options))]
    for _ in range(steps):
        grad = torch.randn(50)
        for parameter, optimizer in pairs:
            parameter.grad = grad.clone()
            optimizer.step()
    return (ours - theirs).abs().max().item()


def collector_states(interval: int) -> list[bool]:
    """Whether Python's garbage collector is on before, during and after a run's part."""
    states = [gc.isenabled()]
    with collected_together(interval):
        states.append(gc.isenabled())
    return [*states, gc.isenabled()]


def wait_for_a_process_that_does_not_come(limit_s: float, absent_s: float) -> float | None:
    """Seconds until rank 0 gave up a collective that rank 1 does not join; None on rank 1."""
    mesh = start_mesh(ParallelOptions(tp=2), seed=1, timeout_s=600)
    mesh.set_timeout(limit_s)
    begin = time.monotonic()
    try:
        if mesh.rank:
            time.sleep(absent_s)
            return None
        dist.all_reduce(torch.ones(1), group=mesh.groups.tp)
        raise AssertionError("the other process came")
    except RuntimeError:
        return time.monotonic() - begin
    finally:
        stop_mesh()


def load_folder(config: str, folder: str) -> None:
    """Loads the weights of a folder, without looking at its seal."""
    options = load_config(config)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        shape = read_model_info(locate_checkpoint(options.model.checkpoint)).shape
        load_weights(Engine(options, shape, mesh), Path(folder))
    finally:
        stop_mesh()


def train_with_a_reader_that_fails(config: str, overrides: list[str], rows: int) -> None:
    """A run whose corpus can no longer be read after some rows of this process."""
    read, left = MixedStream.read, iter(range(rows))

    def failing(stream, ref):
        if next(left, None) is None:
            raise OSError("the disk is gone")
        return read(stream, ref)

    MixedStream.read = failing
    try:
        run_session(load_config(config, overrides), "the same command")
    finally:
        MixedStream.read = read

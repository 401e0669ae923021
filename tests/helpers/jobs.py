"""What worker processes do for tests, through public doors; arguments and results are JSON."""

from pathlib import Path

import torch

from cpt_mega.config import load_config
from cpt_mega.config.load import build_config
from cpt_mega.config.schema import ParallelOptions
from cpt_mega.engine.context import filled_lengths, gathered_order, rank_positions
from cpt_mega.engine.fast_paths import environment
from cpt_mega.engine.mesh import start_mesh, stop_mesh
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.precision import precision_fields
from cpt_mega.errors import InputError
from cpt_mega.hf.shape import ModelShape
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

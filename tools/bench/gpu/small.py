"""Small models for the sections that compare: built through the engine's doors, with equal weights whatever their layers.

Import after ``cpt_mega.engine.fast_paths.apply_environment``. One process, one mesh.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock
from zlib import crc32

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from cpt_mega.config.load import build_config
from cpt_mega.config.schema import Config
from cpt_mega.data.rows import PackedRow
from cpt_mega.engine.host import has_gpu
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.hf.rope import RopeShape
from cpt_mega.hf.shape import ModelShape


@dataclass(frozen=True)
class Scale:
    """Sizes of a section's model and rows; ``ffn`` and head counts fit FP8's blocks of 128 where ``hidden`` does."""

    hidden: int
    layers: int
    vocab: int
    seq_length: int

    def shape(self) -> ModelShape:
        """Heads of 64, half as many for keys and values."""
        heads = max(2, self.hidden // 64)
        return ModelShape(
            family="llama",
            layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=3 * self.hidden,
            heads=heads,
            kv_heads=heads // 2,
            head_dim=self.hidden // heads,
            vocab_size=self.vocab,
            max_positions=self.seq_length,
            norm_eps=1e-5,
            rope=RopeShape(10_000.0),
            tied_embeddings=False,
        )


ON_GPU = Scale(hidden=1024, layers=4, vocab=2048, seq_length=1024)
ON_CPU = Scale(hidden=64, layers=2, vocab=256, seq_length=128)


def small_config(precision: str, seq_length: int, rows: int = 1, at_once: int = 1, clip_norm: float = 1.0) -> Config:
    """A configuration in one process. Raises InputError when this device cannot compute in the precision."""
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "precision": precision,
        "train": {"tokens": 0, "seq_length": seq_length, "global_batch_size": rows, "micro_batch_size": at_once},
        "optimizer": {"lr": 1e-3, "clip_norm": clip_norm, "weight_decay": 0.0},
    }
    return build_config(values)


@contextmanager
def layers_of(kind: str) -> Iterator[None]:
    """Models built inside are made of ``torch`` layers (the CPU's) on any device, or of the platform's own."""
    if kind != "torch":
        yield
        return
    with mock.patch("cpt_mega.engine.backend.has_gpu", return_value=False):
        yield


def fill_weights(engine: Engine, std: float) -> None:
    """Random weights that depend on their names in a checkpoint alone, so that any two engines of a shape get the same.

    Matrices have standard deviation ``std``, norms lie around one. For one process.
    """
    with torch.no_grad():
        for name, tensor in _tensors_by_name(engine):
            draw = torch.Generator().manual_seed(crc32(name.encode()))
            values = torch.randn(tensor.shape, generator=draw, device="cpu")
            tensor.copy_(1 + 0.1 * values if tensor.dim() == 1 else std * values)
        matrices = [p for chunk in engine.core_chunks for p in chunk.parameters() if p.dim() > 1]
        # what core handed out must have been the parameters themselves, all of them
        assert all(abs(p.float().std().item() / std - 1) < 0.1 for p in matrices), "weights were not filled"
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


def _tensors_by_name(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, or the parts of one that a checkpoint holds apart, with their name and place in the checkpoint."""
    for chunk in engine.core_chunks:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": engine.mesh.groups.dp_cp})
        apply_factories(state)
        for part in _leaves(state):
            if isinstance(part, ShardedTensor):
                yield f"{part.key} {part.global_offset}", part.data


def _leaves(value) -> Iterator:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def make_engine(
    config: Config, shape: ModelShape, mesh: Mesh, *, train: bool, layers: str = "own", std: float = 0.02
) -> Engine:
    """An engine with weights by name."""
    with layers_of(layers):
        engine = Engine(config, shape, mesh, train)
    fill_weights(engine, std)
    return engine


def row_of(ids: np.ndarray, lengths: list[int]) -> PackedRow:
    """[S] token ids and the lengths of the documents in them, as the engine takes a row."""
    labels, mask = np.roll(ids, -1), np.ones(len(ids), np.float32)
    mask[np.cumsum(lengths) - 1] = 0
    return PackedRow(ids, np.where(mask == 1, labels, 0), mask, lengths)


def document_lengths(draw: np.random.Generator, total: int, shortest: int) -> list[int]:
    """Lengths that sum to ``total``, spread over orders of magnitude as those of real documents are."""
    lengths, left = [], total
    while left:
        wanted = int(np.exp(draw.uniform(np.log(shortest), np.log(total / 2))))
        length = left if left - wanted < shortest else wanted
        lengths.append(length)
        left -= length
    return lengths


def random_row(draw: np.random.Generator, vocab: int, lengths: list[int]) -> PackedRow:
    """A row of random tokens in documents of these lengths."""
    return row_of(draw.integers(1, vocab, sum(lengths)), lengths)


def device_name() -> str:
    return torch.cuda.get_device_name() if has_gpu() else "CPU"


def free_memory() -> None:
    """Gives back what engines that are gone have left in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()

"""An HF folder as a source of tensors: every name, shape and dtype checked from the headers before anything is read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cpt_mega.errors import InputError
from cpt_mega.hf import safetensors_io
from cpt_mega.hf.config_reader import read_config
from cpt_mega.hf.families import find_family, read_shape, tensor_map
from cpt_mega.hf.safetensors_io import DTYPES, Stored
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.tensor_map import Block, TensorMap

BLOCK_BYTES = 64 * 1024**2  # held at once; also the least that a reader of an imported checkpoint loads at once


@dataclass(frozen=True)
class HfSource:
    """An HF folder whose headers were checked against the map of its shape."""

    folder: Path
    shape: ModelShape
    map: TensorMap
    stored: dict[str, Stored]
    dtype: torch.dtype
    dropped: dict[str, str]

    @property
    def files(self) -> list[Path]:
        return sorted({stored.file for stored in self.stored.values()})


def read_block(
    block: Block, tensor: torch.Tensor, stored: Mapping[str, Stored], files: safetensors_io.OpenFiles
) -> None:
    """Fills ``tensor``, of the block's shape, from the files; rows that no run covers become zero."""
    if sum(run.rows for run in block.runs) < block.rows:
        tensor.zero_()  # padding
    content, row_bytes = safetensors_io.tensor_bytes(tensor), block.target.row_elements * tensor.itemsize
    for run in block.runs:
        start = (run.row - block.row) * row_bytes
        place = stored[run.name]
        piece = content[start : start + run.rows * row_bytes]
        safetensors_io.read_into(files[place.file], piece, place.offset + run.name_row * row_bytes)


def open_source(folder: Path) -> HfSource:
    """Reads headers only.

    Raises InputError for a field, a value or a tensor that is missing, unknown or misshapen, by name.
    """
    config = read_config(folder)
    shape = read_shape(config)
    mapped = tensor_map(shape)
    stored = safetensors_io.find_tensors(folder)
    dropped = _redundant_tensors(shape, stored)
    _check_names(folder, mapped.sources, stored.keys() - dropped.keys())
    for name, expected in mapped.sources.items():
        if stored[name].shape != expected:
            fix = f"{name} must have shape {list(expected)}, as config.json says; this is not that model's file"
            raise InputError(f"{stored[name].file}: {name}", list(stored[name].shape), fix)
    dtype = _one_dtype({name: stored[name] for name in mapped.sources})
    return HfSource(folder, shape, mapped, stored, dtype, dropped)


def _redundant_tensors(shape: ModelShape, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Why by name: tensors that hold nothing of their own. Raises InputError when a tied copy differs."""
    family = find_family(shape.family)
    names = {name.format(layer=layer) for name in family.derived for layer in range(shape.layers)}
    dropped = dict.fromkeys(sorted(names & stored.keys()), "follows from config.json")
    copy, original = family.tied
    if shape.tied_embeddings and copy in stored and original in stored:
        if not _same_bytes(stored[copy], stored[original]):
            fix = f"differs from {original}, which config.json ties it to; set tie_word_embeddings to false"
            raise InputError(str(stored[copy].file), copy, fix)
        dropped[copy] = f"bit-equal to {original}, which it is tied to"
    return dropped


def _same_bytes(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in DTYPES:
        return False
    size = math.prod(one.shape) * DTYPES[one.dtype].itemsize
    with open(one.file, "rb") as left, open(other.file, "rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        pieces = (min(BLOCK_BYTES, size - start) for start in range(0, size, BLOCK_BYTES))
        return all(left.read(piece) == right.read(piece) for piece in pieces)


def _check_names(folder: Path, expected: Mapping[str, tuple], found: Iterable[str]) -> None:
    """Raises InputError naming the first tensor that is missing or has no place."""
    missing, extra = sorted(expected.keys() - set(found)), sorted(set(found) - expected.keys())
    if missing:
        name, more = missing[0], f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(str(folder), name, f"is missing{more}; expected shape {list(expected[name])}")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise InputError(str(folder), extra[0], f"has no place in a model of this config.json{more}; it would be lost")


def _one_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    expected = next(iter(stored.values())).dtype
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{tensor.file}: {name}", tensor.dtype, f"supported dtypes: {', '.join(DTYPES)}")
        if tensor.dtype != expected:
            raise InputError(
                f"{tensor.file}: {name}", tensor.dtype, f"must be {expected}, as the tensors before it are"
            )
    return DTYPES[expected]

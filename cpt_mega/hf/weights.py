"""The name of a model: the same for its HF folder, its import, and any checkpoint of it, saved at whatever layout."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from cpt_mega.errors import InputError
from cpt_mega.hf import safetensors_io, torch_dist
from cpt_mega.hf.families import tensor_map
from cpt_mega.hf.fingerprint import Fingerprint, added, fingerprint, weights_digest
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.source import BLOCK_BYTES, open_source, read_block
from cpt_mega.hf.tensor_map import TensorMap

Progress = Callable[[int, int], None]  # elements done, elements in all
FINGERPRINTS = "fingerprints.json"  # of a checkpoint's tensors, by name


class ModelNames:
    """Which tensors make up a model, and how many rows of each are not padding; ``parameters`` counts their elements."""

    def __init__(self, mapped: TensorMap):
        self.parameters = mapped.parameters
        self.rows = {key: mapped.real_rows(key) for key in mapped.targets}
        self._stacked = {key: len(target.stack) for key, target in mapped.targets.items()}

    @classmethod
    def of(cls, shape: ModelShape) -> "ModelNames":
        return cls(tensor_map(shape))

    def unpadded(self, key: str, values: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
        """A shard without its padding rows, which are no part of the model; what is not the model's stays as it is."""
        if key not in self.rows:
            return values
        axis = self._stacked[key]
        return values.narrow(axis, 0, max(0, min(values.shape[axis], self.rows[key] - offsets[axis])))

    def digest(self, fingerprints: Mapping[str, Fingerprint]) -> str:
        """The name of the model, from the fingerprints of (at least) its tensors."""
        return weights_digest({key: fingerprints[key] for key in self.rows})


def stored_fingerprints(
    folder: Path,
    keys: Iterable[str],
    names: ModelNames,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> dict[str, Fingerprint]:
    """What stands on disk, read chunk by chunk.

    Args:
        keys: of tensors of a checkpoint.
        names: of its model.
        share: as ``torch_dist.read_chunks`` has it; the shares' results add up.

    Raises CheckpointError when a tensor cannot be read or has gaps.
    """
    keys = list(keys)
    index = torch_dist.read_index(folder)
    done, total = 0, sum(math.prod(index[key].size) for key in keys) // share[1]
    found: dict[str, Fingerprint] = dict.fromkeys(keys, Fingerprint())

    def take(key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        nonlocal done
        found[key] += fingerprint(names.unpadded(key, chunk, offsets), offsets, index[key].size)
        done += chunk.numel()
        if progress:
            progress(done, max(done, total))

    torch_dist.read_chunks(folder, keys, torch.float32, take, share)
    return found


def model_digest(path: str | Path, progress: Progress | None = None) -> str:
    """The name of the model in an HF folder, an import, a run (its newest checkpoint) or an ``iter_*`` folder.

    Raises InputError (CheckpointError) when there is none that can be read.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _hf_digest(path, progress)
    folder = locate_checkpoint(path)
    names = ModelNames.of(read_model_info(folder).shape)
    missing = sorted(names.rows.keys() - torch_dist.read_index(folder).keys())
    if missing:
        raise InputError("checkpoint", str(folder), f"has no tensor {missing[0]}, which its model needs")
    return names.digest(stored_fingerprints(folder, names.rows, names, progress=progress))


def _hf_digest(folder: Path, progress: Progress | None) -> str:
    source, scratch = open_source(folder), safetensors_io.Scratch()
    names, parts, done = ModelNames(source.map), [], 0
    with safetensors_io.OpenFiles(os.O_RDONLY) as files:
        for block in source.map.blocks:
            for piece in block.cut(BLOCK_BYTES // source.dtype.itemsize):
                tensor = scratch.tensor(piece.shape, source.dtype)
                read_block(piece, tensor, source.stored, files)
                key, values = block.target.key, names.unpadded(block.target.key, tensor, piece.offsets)
                parts.append({key: fingerprint(values, piece.offsets, block.target.global_shape)})
                done += values.numel()
                if progress:
                    progress(done, source.map.parameters)
    return names.digest(added(parts))

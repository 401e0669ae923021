"""Conversion file to file: a Hugging Face folder to a checkpoint that megatron-core reads, and back.

Neither direction holds the model: import reads rows of safetensors into one buffer and appends it, export reads each
stored chunk once and writes its rows where they belong. Every name, shape and dtype is checked from headers before
the output folder is made; the output appears whole, under its name, or not at all.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf import safetensors_io, torch_dist
from cpt_mega.hf.config_reader import read_config, with_both_spellings
from cpt_mega.hf.digests import BackgroundDigests
from cpt_mega.hf.families import read_shape, tensor_map
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import (
    HF_FOLDER,
    ModelInfo,
    copy_side_files,
    read_model_info,
    tokenizer_digest,
    write_model_info,
)
from cpt_mega.hf.safetensors_io import DTYPES, Stored
from cpt_mega.hf.source import BLOCK_BYTES, HfSource, open_source, read_block
from cpt_mega.hf.tensor_map import Block, Run, TensorMap
from cpt_mega.lineage import (
    building_folder,
    damaged_files,
    folder_files,
    measure_files,
    seal_folder,
    sealed_files,
    text_digest,
)

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CONFIG = "config.json"


@dataclass(frozen=True)
class Report:
    """What a conversion did; every number counts what was really moved.

    Args:
        tensors: HF tensors, each read (or written) exactly once.
        core_tensors: tensors of the checkpoint, each written (or read) exactly once.
        parameters: elements of the HF tensors.
        bytes: of those elements in the output's dtype.
    """

    source: str
    output: str
    family: str
    dtype: str
    tensors: int
    core_tensors: int
    parameters: int
    bytes: int
    seconds: float

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class ImportReport(Report):
    """See Report. ``dropped`` says why by name of each HF tensor that has no place of its own in the checkpoint."""

    padding_rows: int
    dropped: dict[str, str]
    base_digest: str
    tokenizer_digest: str | None


@dataclass(frozen=True)
class ExportReport(Report):
    """See Report. ``files`` are the weight files; ``ignored`` counts the checkpoint's optimizer tensors."""

    files: list[str]
    ignored: int


# ---------------------------------------------------------------------------------------------------------- import


def import_hf(hf_dir: str | Path, output: str | Path, progress: Progress | None = None) -> ImportReport:
    """Writes an HF model as a sealed checkpoint folder in the dtype of its files.

    Args:
        hf_dir: ``config.json``, safetensors, tokenizer files.
        output: must not exist or be empty.
        progress: called with bytes done and bytes in all.

    Raises:
        InputError: a field, a value or a tensor that is missing, unknown or misshapen, by name.
        CheckpointError: the output is not empty.
    """
    started = time.perf_counter()
    source = open_source(Path(hf_dir))
    with building_folder(output) as folder, BackgroundDigests() as digests:
        for file in source.files:
            digests.add(file)
        _write_checkpoint(source, folder, digests.add, progress)
        copy_side_files(source.folder, folder / HF_FOLDER)
        info = ModelInfo(
            shape=source.shape,
            dtype=safetensors_io.dtype_name(source.dtype),
            tokenizer_digest=tokenizer_digest(folder / HF_FOLDER),
            base_digest=base_digest(source.files, digests),
            source=str(hf_dir),
        )
        write_model_info(folder, info)
        _seal(folder, digests)
    return _import_report(source, info, Path(output), time.perf_counter() - started)


def _write_checkpoint(
    source: HfSource, folder: Path, written: Callable[[Path], None], progress: Progress | None
) -> None:
    scratch = safetensors_io.Scratch()
    itemsize = source.dtype.itemsize
    blocks = [part for block in source.map.blocks for part in block.cut(BLOCK_BYTES // itemsize)]
    done, total = 0, sum(block.elements for block in blocks) * itemsize
    with safetensors_io.OpenFiles(os.O_RDONLY) as files:

        def make(block: Block) -> torch.Tensor:
            nonlocal done
            tensor = scratch.tensor(block.shape, source.dtype)
            read_block(block, tensor, source.stored, files)
            done += block.elements * itemsize
            if progress:
                progress(done, total)
            return tensor

        torch_dist.write_blocks(folder, blocks, source.dtype, make, written)


def base_digest(files: Iterable[Path], digests: BackgroundDigests) -> str:
    """One digest over names and contents of the safetensors files, which were added to ``digests``."""
    return text_digest("".join(f"{file.name}\0{digests.measured(file)['sha256']}\0" for file in files))


def _seal(folder: Path, digests: BackgroundDigests) -> None:
    names = folder_files(folder)
    data = [name for name in names if name.endswith(".distcp")]
    measured = {name: digests.measured(folder / name) for name in data}
    seal_folder(folder, measured | measure_files(folder, set(names) - set(data)))


def _import_report(source: HfSource, info: ModelInfo, output: Path, seconds: float) -> ImportReport:
    return ImportReport(
        source=str(source.folder),
        output=str(output),
        family=info.shape.family,
        dtype=info.dtype,
        tensors=len(source.map.sources),
        core_tensors=len(source.map.targets),
        parameters=source.map.parameters,
        bytes=source.map.parameters * source.dtype.itemsize,
        seconds=round(seconds, 3),
        padding_rows=info.shape.padded_vocab_size - info.shape.vocab_size,
        dropped=source.dropped,
        base_digest=info.base_digest,
        tokenizer_digest=info.tokenizer_digest,
    )


# ---------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class _Checkpoint:
    """A sealed checkpoint whose index was checked against the map of its shape."""

    folder: Path
    info: ModelInfo
    config: dict
    map: TensorMap
    dtype: torch.dtype
    ignored: int
    sealed: dict[str, dict]


def export_hf(
    checkpoint_dir: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a checkpoint as an HF folder that transformers 4.57 and 5 load.

    Args:
        checkpoint_dir: a run (its newest checkpoint), an ``iter_*`` folder or an import.
        output: must not exist or be empty.
        dtype: float32, bfloat16 or float16; None or "keep" for that of the checkpoint.
        max_shard_bytes: largest weight file; a larger tensor gets a file of its own.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: not a complete checkpoint, damaged, or not the model it says; or the output is not empty.
        InputError: an unknown dtype, or values that float16 cannot hold.
    """
    started = time.perf_counter()
    if not max_shard_bytes > 0:
        raise InputError("max_shard_bytes", max_shard_bytes, "must be positive")
    checkpoint = _check_checkpoint(locate_checkpoint(checkpoint_dir))
    to_dtype = _target_dtype(dtype, checkpoint.dtype)
    with building_folder(output) as folder, BackgroundDigests() as digests:
        for name in _data_files(checkpoint):
            digests.add(checkpoint.folder / name)
        planned = safetensors_io.plan_shards(folder, checkpoint.map.sources, to_dtype, max_shard_bytes)
        _write_tensors(checkpoint, planned, to_dtype, progress)
        safetensors_io.write_index(folder, planned, to_dtype)
        _write_side_files(checkpoint, folder, safetensors_io.dtype_name(to_dtype))
        # Core loads a flipped bit without a word: what was read must be what was sealed.
        _refuse_damaged(checkpoint, digests)
    files = sorted({stored.file.name for stored in planned.values()})
    return _export_report(checkpoint, Path(output), to_dtype, files, time.perf_counter() - started)


def _check_checkpoint(folder: Path) -> _Checkpoint:
    sealed = sealed_files(folder)
    small = {name: entry for name, entry in sealed.items() if not name.endswith(".distcp")}
    if damaged := damaged_files(folder, small):
        raise CheckpointError("checkpoint", str(folder), f"{damaged[0]} is missing or damaged; name another checkpoint")
    info, config = check_model_files(folder)
    mapped, index = tensor_map(info.shape), torch_dist.read_index(folder)
    ignored = [key for key in index if key.startswith("optimizer.")]
    dtype = check_index(folder, mapped, {key: entry for key, entry in index.items() if key not in set(ignored)})
    return _Checkpoint(folder, info, config, mapped, dtype, len(ignored), sealed)


def check_model_files(folder: Path) -> tuple[ModelInfo, dict]:
    """``model.json`` and ``hf/config.json`` of a checkpoint. Raises InputError when one cannot be read, or they disagree."""
    info = read_model_info(folder)
    config = read_config(folder / HF_FOLDER)
    if read_shape(config) != info.shape:
        raise CheckpointError("checkpoint", str(folder), "model.json and config.json disagree; import again")
    return info, config


def check_index(folder: Path, mapped: TensorMap, index: Mapping[str, TensorStorageMetadata]) -> torch.dtype:
    """The dtype of the model's tensors. Raises CheckpointError naming the first that does not fit the map.

    Args:
        index: of all tensors but the optimizer's.
    """
    missing, extra = sorted(mapped.targets.keys() - index.keys()), sorted(index.keys() - mapped.targets.keys())
    if missing or extra:
        fix = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place in this family"
        raise CheckpointError("checkpoint", str(folder), f"{fix}; name another checkpoint")
    dtypes = {key: entry.properties.dtype for key, entry in index.items()}
    expected = next(iter(dtypes.values()))
    for key, target in mapped.targets.items():
        found = tuple(index[key].size)
        if found != target.global_shape:
            fix = f"{key} must have shape {list(target.global_shape)}; name another checkpoint"
            raise CheckpointError(f"{folder}: {key}", list(found), fix)
        if dtypes[key] != expected or dtypes[key] not in DTYPES.values():
            fix = f"every tensor must be of one dtype among {', '.join(DTYPES)}"
            raise CheckpointError(f"{folder}: {key}", str(dtypes[key]), fix)
    return expected


def _target_dtype(name: str | None, stored: torch.dtype) -> torch.dtype:
    if name in (None, "keep"):
        return stored
    names = {safetensors_io.dtype_name(dtype): dtype for dtype in DTYPES.values()}
    if name not in names:
        raise InputError("dtype", name, f"choose keep or one of {', '.join(names)}")
    return names[name]


def _data_files(checkpoint: _Checkpoint) -> list[str]:
    return [name for name in checkpoint.sealed if name.endswith(".distcp")]


def _write_tensors(
    checkpoint: _Checkpoint, planned: Mapping[str, Stored], dtype: torch.dtype, progress: Progress | None
) -> None:
    safetensors_io.write_headers(planned)
    with safetensors_io.OpenFiles(os.O_WRONLY) as files:
        scatter = _Scatter(checkpoint.map, planned, dtype, files, progress)
        torch_dist.read_chunks(checkpoint.folder, checkpoint.map.targets, dtype, scatter.take)
    if scatter.done != scatter.total:
        raise CheckpointError("checkpoint", str(checkpoint.folder), "rows are missing from it; name another checkpoint")


class _Scatter:
    """Writes the rows of each chunk of core tensors to where they lie in the HF files."""

    def __init__(
        self,
        mapped: TensorMap,
        planned: Mapping[str, Stored],
        dtype: torch.dtype,
        files: safetensors_io.OpenFiles,
        progress: Progress | None,
    ):
        self._map, self._planned, self._files, self._progress = mapped, planned, files, progress
        self.done, self.total = 0, mapped.parameters * dtype.itemsize

    def take(self, key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        """A chunk of the tensor ``key`` that begins at ``offsets``; cut along any axis."""
        if chunk.dtype == torch.float16 and not chunk.isfinite().all():
            raise InputError("dtype", "float16", f"{key} holds values it cannot represent; choose bfloat16 or float32")
        stacked = len(self._map.targets[key].stack)
        row, columns = offsets[stacked], offsets[stacked + 1 :]
        for place in itertools.product(*map(range, chunk.shape[:stacked])):
            entry = tuple(start + step for start, step in zip(offsets, place, strict=False))
            rows = chunk[place]
            for run in self._map.runs(key, entry, row, row + rows.shape[0]):
                self._write(run, columns, rows[run.row - row : run.row - row + run.rows])
        if self._progress:
            self._progress(self.done, self.total)

    def _write(self, run: Run, columns: tuple[int, ...], rows: torch.Tensor) -> None:
        stored = self._planned[run.name]
        full = stored.shape[1:]
        stride, content = math.prod(full) * rows.itemsize, safetensors_io.tensor_bytes(rows)
        offset = stored.offset + run.name_row * stride
        self.done += len(content)
        if tuple(rows.shape[1:]) == full:
            safetensors_io.write_from(self._files[stored.file], content, offset)
            return
        # Cut by columns (a row-parallel weight): a piece of each row.
        offset += columns[0] * math.prod(full[1:]) * rows.itemsize
        width = len(content) // rows.shape[0]
        for number in range(rows.shape[0]):
            piece = content[number * width : (number + 1) * width]
            safetensors_io.write_from(self._files[stored.file], piece, offset + number * stride)


def _write_side_files(checkpoint: _Checkpoint, folder: Path, dtype: str) -> None:
    copy_side_files(checkpoint.folder / HF_FOLDER, folder, leave=(CONFIG,))
    config = with_both_spellings(checkpoint.config, checkpoint.info.shape.rope, dtype)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _refuse_damaged(checkpoint: _Checkpoint, digests: BackgroundDigests) -> None:
    for name in _data_files(checkpoint):
        if digests.measured(checkpoint.folder / name) != checkpoint.sealed[name]:
            raise CheckpointError("checkpoint", str(checkpoint.folder / name), "is damaged; name another checkpoint")


def _export_report(
    checkpoint: _Checkpoint, output: Path, dtype: torch.dtype, files: list[str], seconds: float
) -> ExportReport:
    return ExportReport(
        source=str(checkpoint.folder),
        output=str(output),
        family=checkpoint.info.shape.family,
        dtype=safetensors_io.dtype_name(dtype),
        tensors=len(checkpoint.map.sources),
        core_tensors=len(checkpoint.map.targets),
        parameters=checkpoint.map.parameters,
        bytes=checkpoint.map.parameters * dtype.itemsize,
        seconds=round(seconds, 3),
        files=files,
        ignored=checkpoint.ignored,
    )

"""Distributed checkpoints in megatron-core's ``torch_dist`` format, written and read block by block by one process.

The files are torch.distributed.checkpoint's own (``.metadata``, ``*.distcp``), with the two that core adds:
``metadata.json`` names the format, ``common.pt`` holds values that are not tensors (core 0.16 requires it; 0.19 does
not). No process group is made, and never more than one block or stored chunk is in memory.

Source of the layout: megatron/core/dist_checkpointing/core.py and strategies/torch.py.
"""

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from cpt_mega.errors import CheckpointError
from cpt_mega.hf.safetensors_io import Scratch
from cpt_mega.hf.tensor_map import Block
from cpt_mega.hf.untrusted import COMMON_FILE, read_metadata
from cpt_mega.lineage import write_json

FORMAT_FILE = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What torch raises for bytes that are no tensor, or not the one that the index says. Anything else is the caller's.
_UNREADABLE = (
    *(RuntimeError, EOFError, KeyError, ValueError, FileNotFoundError, AssertionError),
    *(pickle.UnpicklingError, AttributeError, TypeError, IndexError),
)
MAX_FILE_BYTES = 4 * 1024**3  # files that another process can digest, or a file system can stripe, while the next grows


class _BlockPlanner(DefaultSavePlanner):
    """Makes each block's tensor only when the writer comes to it."""

    def __init__(self, blocks: Iterable[Block], make: Callable[[Block], torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self._blocks = {(block.target.key, block.offsets): block for block in blocks}
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._make(self._blocks[write_item.index.fqn, tuple(write_item.index.offset)])


class _Writer(FileSystemWriter):
    """Without the folder's temporary name and the random number that torch adds: the same blocks are the same bytes."""

    def storage_meta(self) -> None:
        return None


def write_blocks(
    folder: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    make: Callable[[Block], torch.Tensor],
    written: Callable[[Path], None] = lambda file: None,
) -> None:
    """Writes a checkpoint of the blocks into ``folder``.

    Args:
        blocks: must tile their tensors; torch's planner checks it (ValueError).
        make: the block's values, shape ``block.shape``; its memory may be used again at the next call.
        written: called with each data file when it is complete.
    """
    # Copying ahead would keep several blocks at once and break the reuse of their memory: it is switched off.
    writer = _Writer(folder, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    planner = _BlockPlanner(blocks, make)
    plans = [SavePlan([_write_item(block, dtype) for block in batch]) for batch in _files_of(blocks, dtype.itemsize)]
    plans, metadata = planner.create_global_plan(plans)
    results = []
    for number, plan in enumerate(writer.prepare_global_plan(plans)):
        results.append(writer.write_data(plan, planner).wait())
        written(folder / f"__{number}_0.distcp")
    writer.finish(metadata, results)
    torch.save({}, folder / COMMON_FILE)
    write_json(folder / FORMAT_FILE, FORMAT)  # last: core takes a folder with it for a whole checkpoint


def _files_of(blocks: Iterable[Block], itemsize: int) -> Iterator[list[Block]]:
    """Blocks in lists of at most MAX_FILE_BYTES (at least one block each)."""
    batch, size = [], 0
    for block in blocks:
        if batch and size + block.elements * itemsize > MAX_FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += block.elements * itemsize
    if batch:
        yield batch


def _write_item(block: Block, dtype: torch.dtype) -> WriteItem:
    offsets, extent = torch.Size(block.offsets), torch.Size(block.shape)
    return WriteItem(
        index=MetadataIndex(block.target.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, extent),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(block.target.global_shape),
        ),
    )


def read_index(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and chunks of every tensor of a checkpoint, by key; values that are not tensors are left out.

    Raises CheckpointError as ``untrusted.read_metadata`` does.
    """
    return TensorReader(folder).index


class _ChunkPlanner(DefaultLoadPlanner):
    """Hands each stored chunk to a callback; the chunk's memory is used again for the next."""

    def __init__(self, dtype: torch.dtype, take: Callable[[str, tuple[int, ...], torch.Tensor], None]):
        super().__init__()
        self._dtype, self._take, self._scratch = dtype, take, Scratch()

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._scratch.tensor(tuple(read_item.lengths), self._dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._take(read_item.storage_index.fqn, tuple(read_item.storage_index.offset), tensor)


def read_chunks(
    folder: Path,
    keys: Iterable[str],
    dtype: torch.dtype,
    take: Callable[[str, tuple[int, ...], torch.Tensor], None],
    share: tuple[int, int] = (0, 1),
) -> None:
    """Reads whole tensors chunk by chunk, each stored chunk once, whatever layout wrote it.

    Args:
        share: ``(k, n)`` reads every n-th chunk from the k-th on, for n processes that read together.
        dtype: what values are converted to.
        take: called with key, offsets in the global tensor, and the chunk; the chunk is overwritten afterwards.

    Raises:
        CheckpointError: chunks overlap or leave a gap, or a file cannot be read.
    """
    TensorReader(folder).read(keys, dtype, take, share=share)


class TensorReader:
    """Tensors of a checkpoint, for many reads: its index is read once.

    Attributes:
        index: what ``read_index`` gives.

    Raises CheckpointError when the index cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder, self._reader = folder, FileSystemReader(folder)
        metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(metadata, True)
        entries = metadata.state_dict_metadata.items()
        self.index = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(
        self,
        keys: Iterable[str],
        dtype: torch.dtype,
        take: Callable[[str, tuple[int, ...], torch.Tensor], None],
        within: range | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """As ``read_chunks``; ``within`` leaves out chunks that begin elsewhere along the first dimension."""
        items = []
        for key in keys:
            entry = self.index[key]
            _check_tiling(self._folder, key, entry)
            items += [_read_item(key, chunk) for chunk in entry.chunks if within is None or chunk.offsets[0] in within]
        try:
            self._reader.read_data(LoadPlan(items[share[0] :: share[1]]), _ChunkPlanner(dtype, take)).wait()
        except _UNREADABLE as error:
            fix = f"a tensor cannot be read ({_first_line(error)})"
            raise CheckpointError("checkpoint", str(self._folder), fix) from error


def _check_tiling(folder: Path, key: str, entry: TensorStorageMetadata) -> None:
    stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    distinct = {tuple(chunk.offsets) for chunk in entry.chunks}
    if stored != math.prod(entry.size) or len(distinct) != len(entry.chunks):
        raise CheckpointError("checkpoint", str(folder), f"the chunks of {key} do not tile it; name another checkpoint")


def _read_item(key: str, chunk: ChunkStorageMetadata) -> ReadItem:
    index = MetadataIndex(key, chunk.offsets)
    origin = torch.Size([0] * len(chunk.sizes))
    return ReadItem(LoadItemType.TENSOR, index, origin, index, origin, chunk.sizes)


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Safetensors files by byte range: where each tensor lies, reading rows of it, writing rows of it.

The library validates every header. The bytes are then read and written with ``pread`` and ``pwrite`` on plain files:
page faults of a memory map cost several times more than a read into a warm buffer, and rows arrive in any order.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cpt_mega.errors import InputError
from cpt_mega.lineage import is_local_name, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the spelling of config.json."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``offset`` in bytes from the file's start, ``dtype`` in the format's code (``BF16``)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def find_tensors(hf_dir: str | Path) -> dict[str, Stored]:
    """Every tensor of a folder that holds ``model.safetensors`` or an index with its shards; only headers are read.

    Raises:
        InputError: no such files, a damaged header, or an index that disagrees with the files.
    """
    folder = Path(hf_dir)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise InputError("hf", str(folder), f"holds neither {SINGLE} nor {INDEX}; save the model as safetensors")
        return _read_header(folder / SINGLE)
    owners = _read_index(folder / INDEX)
    found: dict[str, Stored] = {}
    for file in sorted(set(owners.values())):
        held = _read_header(folder / file)
        if unlisted := sorted(name for name in held if owners.get(name) != file):
            raise InputError(str(folder / file), unlisted[0], f"is not listed for this file in {INDEX}; mend the index")
        found |= held
    if missing := sorted(owners.keys() - found.keys()):
        raise InputError(str(folder / INDEX), missing[0], f"is not in {owners[missing[0]]}; download the model again")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """File name by tensor name. Files are plain names: an index cannot reach outside its folder.

    Links are followed wherever they lead: the cache of Hugging Face's hub is made of them.
    """
    try:
        owners = dict(read_json(path)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("hf", str(path), f"is not a safetensors index ({error!r})") from error
    for name, file in owners.items():
        if not is_local_name(file) or "/" in file or not file.endswith(".safetensors"):
            raise InputError(str(path), {name: file}, "weight_map must name .safetensors files of the same folder")
    return owners


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):  # refuses gaps, overlaps and lengths that do not fit the file
            pass
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError("hf", str(path), f"cannot be read as safetensors ({error})") from error
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


class OpenFiles:
    """File descriptors kept open by path while a conversion runs; a context manager."""

    def __init__(self, flags: int):
        self._flags, self._open = flags, {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def __getitem__(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, self._flags, 0o644)
        return self._open[path]


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fills ``buffer`` from the file at ``offset`` bytes. Raises EOFError when the file ends first."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise EOFError("a safetensors file was cut while it was read")
        buffer, offset = buffer[count:], offset + count


def write_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Writes all of ``buffer`` to the file at ``offset`` bytes."""
    while len(buffer):
        count = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[count:], offset + count


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Scratch:
    """One buffer that grows to the largest tensor asked for and is used again for each: no page is faulted twice."""

    def __init__(self):
        self._bytes = bytearray()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor whose storage is exactly its own bytes; the one handed out before is overwritten."""
        elements = math.prod(shape)
        if elements * dtype.itemsize > len(self._bytes):
            self._bytes = bytearray(elements * dtype.itemsize)
        return torch.frombuffer(self._bytes, dtype=dtype, count=elements).view(shape)


def plan_shards(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: float
) -> dict[str, Stored]:
    """Where each tensor will lie: files of at most ``max_shard_bytes``, filled in the natural order of the names.

    A tensor larger than that gets a file of its own. One file is ``model.safetensors``.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(shapes, key=_natural):
        size = math.prod(shapes[name]) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    planned: dict[str, Stored] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        planned |= _layout(folder / file, names, shapes, dtype)
    return planned


def write_headers(planned: Mapping[str, Stored]) -> None:
    """Creates every planned file with its header and its full length, so that rows can be written anywhere in it."""
    for file, names in _by_file(planned).items():
        shapes = {name: planned[name].shape for name in names}
        dtype = DTYPES[planned[names[0]].dtype]
        header = _header(names, shapes, dtype)
        with open(file, "wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + _total_bytes(shapes.values(), dtype))


def write_index(folder: Path, planned: Mapping[str, Stored], dtype: torch.dtype) -> None:
    """``model.safetensors.index.json`` when there is more than one file."""
    if len(_by_file(planned)) == 1:
        return
    index = {
        "metadata": {"total_size": _total_bytes((stored.shape for stored in planned.values()), dtype)},
        "weight_map": {name: stored.file.name for name, stored in planned.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _natural(name: str) -> list:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _by_file(planned: Mapping[str, Stored]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, stored in planned.items():
        files.setdefault(stored.file, []).append(name)
    return files


def _total_bytes(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(map(math.prod, shapes)) * dtype.itemsize


def _layout(
    file: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Stored]:
    offset, placed = len(_header(names, shapes, dtype)), {}
    for name in names:
        placed[name] = Stored(file, DTYPE_CODES[dtype], tuple(shapes[name]), offset)
        offset += math.prod(shapes[name]) * dtype.itemsize
    return placed


def _header(names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The file's first bytes. ``format: pt`` is what transformers asks for; data begins at a multiple of 8."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

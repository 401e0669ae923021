"""Checkpoint files of unknown origin: nothing that they hold may run as code.

torch reads a checkpoint's index (``.metadata``) with plain pickle, and its planner reads every value that is not a tensor
with ``torch.load(weights_only=False)``; megatron-core goes through both. A pickle calls what it names. So here

- ``read_metadata`` reads the index by a table of names: what is not in it is refused, and nothing is imported for it;
- ``first_refused`` reads the values that are not tensors as ``torch.load(weights_only=True)`` does, before core does;
- ``only_data`` holds torch and core themselves to these two while core loads, so that a file that is swapped between the
  look and the load gains nothing.

What a tensor is stored as, torch reads with ``weights_only=True`` on its own account.
"""

import io
import math
import os
import pickle
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cpt_mega.errors import CheckpointError
from cpt_mega.lineage import is_inside

INDEX_FILE = ".metadata"
COMMON_FILE = "common.pt"
# State of Transformer Engine's modules: they unpickle it themselves, so it is never loaded.
EXTRA_STATE = "_extra_state"

_FIX = "not a checkpoint that this project or megatron-core writes; do not load it"
_WANTED = re.compile(r"GLOBAL (\S+) (?:was not|whose module)")  # how torch's restricted unpickler names what it refuses

# All that the indexes name which torch and megatron-core (0.16 and 0.19) write, besides torch.Size and dtypes.
_RECORDS = frozenset(
    {
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # The plans of all ranks, which core leaves there.
        *(("torch.distributed.checkpoint.planner", name) for name in (
            "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
        )),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),  # where it was written
    }
)  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Refused(ValueError):
    """An index that names what it may not, or says what cannot be."""


class _Record:
    """Stands for an object of an index: what it was made of, unchecked."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _IndexUnpickler(pickle._Unpickler):
    """Makes records, numbers and names. Every name stands for a class of this unpickler's own.

    A pickle can write to a class that it gets hold of, without a call: so it gets none that anything else uses.

    It is the one in Python, though that of C is four times as fast: that one takes and touches 64 GiB for a place of the memo
    that five bytes can name. Buffers and sets are none of an index's, and a key is a name or a record: the hash of a tuple of
    tuples takes a time that doubles with each of a pickle's bytes.
    """

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
    }

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.made: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _RECORDS:
            return self.made.setdefault(name, type(name, (_Record,), {}))
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        raise _Refused(f"wants to load {module}.{name}")


def _check_key(key: object) -> None:
    if not isinstance(key, str | int | _Record):
        raise _Refused(f"has a {type(key).__name__} for a key")


def read_metadata(folder: str | os.PathLike) -> Metadata:
    """The index of a checkpoint, by which its data files may be read: every place that it names is one in the folder.

    Raises CheckpointError when it cannot be read, names anything but the records of an index, or says what cannot be.
    """
    path = Path(folder) / INDEX_FILE
    try:
        unpickler = _IndexUnpickler(io.BytesIO(path.read_bytes()))  # which gives no more bytes than there are
        return _Index(Path(folder), unpickler.load(), unpickler.made).metadata()
    except _Refused as error:
        raise CheckpointError("checkpoint", str(path), f"{error}: {_FIX}") from error
    except Exception as error:  # a pickle fails in any way it likes
        said = error if isinstance(error, OSError) else repr(error)  # that of a missing file names it
        raise CheckpointError("checkpoint", str(path), f"the index cannot be read ({said}); name another") from error


class _Index:
    """Makes torch's own objects of the records of an index, each checked against the others and the files.

    Its methods raise _Refused, or what a record without its fields gives.
    """

    def __init__(self, folder: Path, content: object, kinds: dict[str, type[_Record]]):
        self._folder, self._content, self._kinds = folder, content, kinds
        self._sizes: dict[str, int] = {}

    def metadata(self) -> Metadata:
        fields = self._fields(self._content, "Metadata")
        places = {self._index(index): self._place(place) for index, place in fields["storage_data"].items()}
        entries = {key: self._entry(key, entry, places) for key, entry in fields["state_dict_metadata"].items()}
        return Metadata(entries, storage_data=places, storage_meta=StorageMeta())

    def _fields(self, record: object, kind: str) -> dict:
        if type(record) is not self._kinds.get(kind):
            raise _Refused(f"holds a {type(record).__name__} for a {kind}")
        return record.state

    def _index(self, record: object) -> MetadataIndex:
        fields = self._fields(record, "MetadataIndex")
        offset = fields.get("offset")
        return MetadataIndex(_name(fields["fqn"]), None if offset is None else _numbers(offset))

    def _place(self, record: object) -> _StorageInfo:
        fields = self._fields(record, "_StorageInfo")
        name, offset, length = fields["relative_path"], fields["offset"], fields["length"]
        _numbers((offset, length))
        if name not in self._sizes:
            if not is_inside(self._folder, name):
                raise _Refused(f"names {name!r}, which is not in the folder")
            self._sizes[name] = os.path.getsize(self._folder / name)
        size = self._sizes[name]
        if offset + length > size:
            raise _Refused(f"names bytes {offset} to {offset + length} of {name}, which has {size}")
        if fields.get("transform_descriptors"):
            raise _Refused(f"says that {name} is stored in another format")
        return _StorageInfo(name, offset, length)

    def _entry(
        self, key: object, record: object, places: dict[MetadataIndex, _StorageInfo]
    ) -> TensorStorageMetadata | BytesStorageMetadata:
        index = MetadataIndex(_name(key))
        if type(record) is self._kinds.get("BytesStorageMetadata"):
            if index not in places:
                raise _Refused(f"does not say where {key} lies")
            return BytesStorageMetadata()
        fields = self._fields(record, "TensorStorageMetadata")
        dtype, size = self._fields(fields["properties"], "TensorProperties")[0], _numbers(fields["size"])
        if not isinstance(dtype, torch.dtype):
            raise _Refused(f"gives no dtype of {key}")
        chunks = [self._chunk(chunk, size) for chunk in fields["chunks"]]
        for chunk in chunks:  # memory is taken by these numbers
            stored = places[MetadataIndex(key, chunk.offsets)].length
            needed = math.prod(chunk.sizes) * dtype.itemsize
            if needed > stored:
                raise _Refused(f"has a chunk of {key} that takes {needed} bytes in {stored}")
        return TensorStorageMetadata(TensorProperties(dtype), size, chunks)

    def _chunk(self, record: object, size: torch.Size) -> ChunkStorageMetadata:
        fields = self._fields(record, "ChunkStorageMetadata")
        offsets, extent = _numbers(fields["offsets"]), _numbers(fields["sizes"])
        if not all(begin + length <= whole for begin, length, whole in zip(offsets, extent, size, strict=True)):
            raise _Refused(f"has a chunk of {list(extent)} at {list(offsets)} in a tensor of {list(size)}")
        return ChunkStorageMetadata(offsets, extent)


def _name(value: object) -> str:
    if type(value) is not str:
        raise _Refused(f"holds a {type(value).__name__} for a name")
    return value


def _numbers(values: object) -> torch.Size:
    """A shape or a place: numbers from 0 up."""
    if type(values) is not tuple or not all(type(value) is int for value in values) or min(values, default=0) < 0:
        raise _Refused(f"holds {reprlib.repr(values)} for a shape or a place")
    return torch.Size(values)


@dataclass(frozen=True)
class Pickled:
    """Bytes of a checkpoint that core reads with torch.load; ``length`` is None for a whole file."""

    file: Path
    offset: int = 0
    length: int | None = None


def pickled_parts(folder: Path) -> list[Pickled]:
    """Everything in a checkpoint that core loads and that is not a tensor. Raises CheckpointError as ``read_metadata`` does."""
    metadata = read_metadata(folder)
    names = (key for key, entry in metadata.state_dict_metadata.items() if type(entry) is BytesStorageMetadata)
    places = [metadata.storage_data[MetadataIndex(name)] for name in names if EXTRA_STATE not in name]
    common = [Pickled(folder / COMMON_FILE)] if (folder / COMMON_FILE).exists() else []
    return common + [Pickled(folder / place.relative_path, place.offset, place.length) for place in places]


def first_refused(parts: Iterable[Pickled]) -> CheckpointError | None:
    """What is wrong with the first part that holds anything but plain values, tensors and core's own records."""
    for part in parts:
        try:
            with open(part.file, "rb") as stream:
                stream.seek(part.offset)
                content = io.BytesIO(stream.read(part.length))
            torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # as above
            wanted = _WANTED.search(str(error))
            problem = f"wants to load {wanted[1]}" if wanted else f"cannot be read as data ({_last_line(error)})"
            return CheckpointError("checkpoint", str(part.file), f"{problem}: {_FIX}")
    return None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line and "pytorch.org" not in line]
    return (lines or [type(error).__name__])[-1]


@contextmanager
def only_data() -> Iterator[None]:
    """Within it, nothing in this process unpickles more than this module does, whatever torch and core ask for.

    There is no reader that core can be given: it makes its own, and its planner asks for ``weights_only=False``. So torch's
    documented switch is set, and the method that all of core's readers inherit is replaced, for the time of the load.
    """
    forced, not_forced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    kept = {name: os.environ.pop(name, None) for name in (forced, not_forced)}
    plain = FileSystemReader.read_metadata
    os.environ[forced] = "1"
    # Without torch's arguments, by which it would go on to the indexes of single ranks when this one is refused.
    FileSystemReader.read_metadata = lambda reader: read_metadata(reader.path)
    try:
        yield
    finally:
        FileSystemReader.read_metadata = plain
        del os.environ[forced]
        os.environ.update({name: value for name, value in kept.items() if value is not None})

"""Input files as batches of documents, a part of a file at a time.

A **unit** is a part of the inputs that can be read on its own: a range of bytes of a JSONL file, a whole compressed file,
a range of row groups of a Parquet file, some files of a folder. Which units there are is a function of the inputs alone
(``plan_units`` in ``units``), so that any number of processes and of machines may read them.

A new kind of input is a unit class here and a line in ``units.PLANNERS``.
"""

import gzip
import hashlib
import io
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import orjson

from cpt_mega.data.rejects import BINARY, EXCERPT_CHARACTERS, Reject
from cpt_mega.errors import InputError
from cpt_mega.lineage import file_digest

# Of input, read and encoded at once: what bounds the memory of a process, with its longest document.
BATCH_BYTES = 2 << 20
READ_AHEAD_BYTES = 1 << 18
SHORTER = "became shorter while it was read; run again"
LINE_END = ord("\n")
SIZES = ("total_byte_size", "num_rows")  # of a Parquet row group


@dataclass(frozen=True)
class Fields:
    """Where the text of a record stands: the name of a field that holds text, or, for chats, a list of messages."""

    name: str = "text"
    chat: bool = False

    def content(self, record: object) -> object:
        """The text or the messages of a record; a ``_Problem`` when there are none."""
        if not isinstance(record, dict):
            return _Problem("not a JSON object")
        if self.name not in record:
            return _Problem(f"no field {self.name!r}: its keys are {', '.join(map(str, record)) or 'none'}")
        content = record[self.name]
        if not isinstance(content, list if self.chat else str):
            return _Problem(f"field {self.name!r} is not {'a list of messages' if self.chat else 'text'}")
        return content


class Document(NamedTuple):
    """A text or a list of messages, and where it stands: file and line or row there (from 1)."""

    path: str
    line: int
    content: str | list

    def rejected(self, reason: str) -> Reject:
        """This document as one left out."""
        try:
            shown = self.content if isinstance(self.content, str) else str(self.content)
        except RecursionError:
            shown = "..."
        return Reject(self.path, self.line, reason, shown[:EXCERPT_CHARACTERS])


@dataclass
class Batch:
    """Documents that are encoded together, in order, with those that could not be read.

    Attributes:
        items: what the batch holds, in order; lines count from the unit's first, or from the file's.
        lines: lines that were read, blank ones included.
        input_bytes: of the input that were read for it, for progress.
    """

    items: list[Document | Reject] = field(default_factory=list)
    lines: int = 0
    input_bytes: int = 0

    @property
    def documents(self) -> list[Document]:
        """Those that could be read."""
        return [item for item in self.items if isinstance(item, Document)]


class Unit(Protocol):
    """A part of one input.

    Attributes:
        source: index of the input.
        path: of the file or folder.
        input_bytes: how much of the input it stands for.
    """

    source: int
    path: str
    input_bytes: int

    def read(self, fields: Fields) -> Iterator[Batch]:
        """Everything in it. Raises InputError when the file cannot be read as what it is."""

    def digest(self) -> str:
        """SHA-256 of the bytes it stands for, as hex."""


class _Problem(str):
    """Why there is no text in a record."""


@dataclass(frozen=True)
class JsonlRange:
    """The lines of a JSONL file that begin within a range of bytes, counted from 1. Blank lines are no documents."""

    source: int
    path: str
    start: int
    stop: int

    @property
    def input_bytes(self) -> int:
        """See Unit."""
        return self.stop - self.start

    def read(self, fields: Fields) -> Iterator[Batch]:
        """See Unit."""
        with open(self.path, "rb", READ_AHEAD_BYTES) as stream:
            self._seek_first_line(stream)
            while (at := stream.tell()) < self.stop:
                block = stream.read(min(BATCH_BYTES, self.stop - at))
                if not block:
                    raise InputError("--input", self.path, SHORTER)
                yield _parse_lines(self.path, _with_last_line(block, stream), fields, min(len(block), self.stop - at))

    def digest(self) -> str:
        """See Unit."""
        return file_slice_digest(self.path, self.start, self.stop)

    def _seek_first_line(self, stream: BinaryIO) -> None:
        """A line that runs into the range belongs to the unit it begins in, however long it is."""
        if self.start == 0:
            _skip_mark(stream)
            return
        stream.seek(self.start - 1)
        while stream.tell() < self.stop and not (line := stream.readline(BATCH_BYTES)).endswith(b"\n"):
            if not line:
                raise InputError("--input", self.path, SHORTER)


@dataclass(frozen=True)
class CompressedJsonl:
    """A gzip or zstd file of JSON lines; it can only be read from its beginning."""

    source: int
    path: str
    input_bytes: int

    def read(self, fields: Fields) -> Iterator[Batch]:
        """See Unit."""
        library = self._library()
        line, counted = 0, 0
        try:
            with open(self.path, "rb") as raw, library.open(raw) as unpacked:
                stream = io.BufferedReader(unpacked, READ_AHEAD_BYTES)
                _skip_mark(stream)
                while block := stream.read(BATCH_BYTES):
                    whole = _with_last_line(block, stream)
                    batch = _parse_lines(self.path, whole, fields, raw.tell() - counted, line)
                    counted, line = raw.tell(), line + batch.lines
                    yield batch
        except (OSError, EOFError, zlib.error, *library.errors) as error:
            fix = f"cannot be unpacked ({error}); it is damaged, or of another kind than its name says"
            raise InputError("--input", self.path, fix) from error

    def digest(self) -> str:
        """See Unit."""
        return file_digest(self.path)

    def _library(self) -> "_Decompressor":
        if self.path.endswith(".gz"):
            return _Decompressor(gzip.open, ())
        # Not the older zstandard, whose reader takes a file that was cut for a whole one.
        from backports import zstd

        return _Decompressor(zstd.open, (zstd.ZstdError,))


class _Decompressor(NamedTuple):
    open: Callable[[BinaryIO], io.BufferedIOBase]
    errors: tuple[type[Exception], ...]


@dataclass(frozen=True)
class ParquetGroups:
    """Row groups ``first`` to ``last`` of a Parquet file; ``row`` is the number of the first row, from 0."""

    source: int
    path: str
    start: int
    stop: int
    first: int
    last: int
    row: int

    @property
    def input_bytes(self) -> int:
        """See Unit."""
        return self.stop - self.start

    def read(self, fields: Fields) -> Iterator[Batch]:
        """See Unit."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                if fields.name not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise InputError("--field", fields.name, f"no column of {self.path}; give one of {names}")
                groups, row = range(self.first, self.last), self.row
                size, rows = (sum(getattr(file.metadata.row_group(group), name) for group in groups) for name in SIZES)
                at_once = max(1, rows * BATCH_BYTES // max(size, 1))
                for part in file.iter_batches(at_once, list(groups), [fields.name], use_threads=False):
                    yield self._batch(part.column(0), row, fields, self.input_bytes * len(part) // max(rows, 1))
                    row += len(part)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError("--input", self.path, f"cannot be read as Parquet ({error}); write it again") from error

    def digest(self) -> str:
        """See Unit."""
        return file_slice_digest(self.path, self.start, self.stop)

    def _batch(self, column: object, row: int, fields: Fields, input_bytes: int) -> Batch:
        batch = Batch(lines=len(column), input_bytes=input_bytes)
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:  # one of them: Parquet's writers do not check
            values = [_decoded(value) for value in column]
        for line, value in enumerate(values, row + 1):
            value = _without_absent(value) if fields.chat else value
            content = value if isinstance(value, _Problem) else fields.content({fields.name: value})
            _take(batch, self.path, line, content, b"")
        return batch


@dataclass(frozen=True)
class FileGroup:
    """Some files of a folder, each one document; ``names`` are relative to it."""

    source: int
    path: str
    names: tuple[str, ...]
    input_bytes: int

    def read(self, fields: Fields) -> Iterator[Batch]:
        """See Unit."""
        batch = Batch()
        for name in self.names:
            path = os.path.join(self.path, name)
            with open(path, "rb") as stream:
                raw = stream.read()
            batch.input_bytes += len(raw)
            batch.lines += 1
            _take(batch, path, 1, _file_text(raw), raw)
            if batch.input_bytes >= BATCH_BYTES:
                yield batch
                batch = Batch()
        yield batch

    def digest(self) -> str:
        """SHA-256 over the files' names and contents."""
        total = hashlib.sha256()
        for name in self.names:
            total.update(f"{file_digest(os.path.join(self.path, name))}  ".encode() + os.fsencode(name) + b"\n")
        return total.hexdigest()


def file_slice_digest(path: str, start: int, stop: int) -> str:
    """SHA-256 of a range of a file's bytes, as hex."""
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        stream.seek(start)
        while start < stop and (block := stream.read(min(BATCH_BYTES, stop - start))):
            total.update(block)
            start += len(block)
    return total.hexdigest()


def _without_absent(value: object) -> object:
    """Messages without the keys that they lack: in Parquet all have all, and None stands for what is not there."""
    if isinstance(value, list):
        return [_without_absent(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_absent(each) for key, each in value.items() if each is not None or key == "content"}
    return value


def _decoded(value: object) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return _Problem("not UTF-8")


def _file_text(raw: bytes) -> str:
    if b"\0" in raw:
        return _Problem(f"{BINARY}: it holds NUL bytes")
    return _not_utf8(raw) or raw.removeprefix(BOM_UTF8).decode()


def _not_utf8(raw: bytes) -> _Problem | None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return _Problem(f"not UTF-8: {error.reason} at byte {error.start}")
    return None


def _skip_mark(stream: io.BufferedReader) -> None:
    """Some editors put a byte order mark at the start of a file; it is no part of the first line."""
    if stream.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
        stream.read(len(BOM_UTF8))


def _with_last_line(block: bytes, stream: BinaryIO) -> bytes:
    """The block and the rest of the line that it ends in, however long."""
    return block if block.endswith(b"\n") else block + stream.readline()


def _parse_lines(path: str, block: bytes, fields: Fields, input_bytes: int, before: int = 0) -> Batch:
    """Whole lines as documents; lines count from ``before``. Every line that is not blank is a document or a Reject."""
    view, ends = memoryview(block), np.flatnonzero(np.frombuffer(block, np.uint8) == LINE_END).tolist()
    if not block.endswith(b"\n"):
        ends.append(len(block))
    batch = Batch(lines=len(ends), input_bytes=input_bytes)
    for line, (start, end) in enumerate(zip([0, *(end + 1 for end in ends)], ends, strict=False), before + 1):
        raw = view[start:end]  # not copied
        try:
            content = fields.content(orjson.loads(raw))
        except orjson.JSONDecodeError as error:
            if not bytes(raw).strip():
                continue
            content = _not_utf8(bytes(raw)) or _Problem(f"not JSON: {error}")
        _take(batch, path, line, content, raw)
    return batch


def _take(batch: Batch, path: str, line: int, content: object, raw: bytes | memoryview) -> None:
    path = path if path.isascii() else os.fsencode(path).decode(errors="backslashreplace")  # names may be any bytes
    if isinstance(content, _Problem):
        batch.items.append(Reject(path, line, str(content), bytes(raw[:EXCERPT_CHARACTERS]).decode(errors="replace")))
    else:
        batch.items.append(Document(path, line, content))

"""Input files as chunks of documents: read in order by one process, parsed wherever the chunk is sent.

A reader is a function ``(path, field) -> iterator of chunks``, registered in ``READERS`` under the suffixes it takes.
"""

import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson

from cpt_mega.data.rejects import EXCERPT_CHARACTERS, Reject
from cpt_mega.errors import InputError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text, and where it stands: file and line (from 1)."""

    path: str
    line: int
    text: str

    def rejected(self, reason: str) -> Reject:
        """This document as one left out."""
        return Reject(self.path, self.line, reason, self.text[:EXCERPT_CHARACTERS])


class Chunk(Protocol):
    """A part of a file that can be sent to a worker."""

    input_bytes: int

    def parse(self) -> Iterator[Document | Reject]:
        """Every document of the chunk, in order; what cannot be read comes as a Reject."""


@dataclass(frozen=True)
class JsonlChunk:
    """Whole lines of a JSONL file. Blank lines are no documents; every other line is one or a Reject."""

    path: str
    first_line: int
    data: bytes
    field: str

    @property
    def input_bytes(self) -> int:
        """See Chunk."""
        return len(self.data)

    def parse(self) -> Iterator[Document | Reject]:
        """See Chunk."""
        for line, raw in enumerate(self.data.split(b"\n"), self.first_line):
            if raw.strip():
                yield self._parse_line(line, raw)

    def _parse_line(self, line: int, raw: bytes) -> Document | Reject:
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            return self._reject(line, raw, f"not JSON: {error}")
        if not isinstance(record, dict):
            return self._reject(line, raw, "not a JSON object")
        if self.field not in record:
            return self._reject(line, raw, f"no field {self.field!r}")
        text = record[self.field]
        if not isinstance(text, str):
            return self._reject(line, raw, f"field {self.field!r} is not text")
        return Document(self.path, line, text)

    def _reject(self, line: int, raw: bytes, reason: str) -> Reject:
        return Reject(self.path, line, reason, raw[:EXCERPT_CHARACTERS].decode(errors="replace"))


def read_jsonl(path: str, field: str) -> Iterator[JsonlChunk]:
    """Chunks of about one MiB that end at line ends; a longer line is a chunk of its own."""
    line = 1
    with open(path, "rb") as stream:
        if stream.read(len(BOM_UTF8)) != BOM_UTF8:  # some editors put one at the start; it is no part of the first line
            stream.seek(0)
        while lines := stream.readlines(CHUNK_BYTES):
            yield JsonlChunk(path, line, b"".join(lines), field)
            line += len(lines)


READERS: dict[str, Callable[[str, str], Iterator[Chunk]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
}


def check_input(path: str | os.PathLike) -> None:
    """Raises InputError when a file is missing or no reader takes it."""
    if not os.path.isfile(path):
        raise InputError("--input", str(path), "no such file")
    if Path(path).suffix not in READERS:
        raise InputError("--input", str(path), f"give files that end in one of {', '.join(READERS)}")


def read_chunks(path: str | os.PathLike, field: str) -> Iterator[Chunk]:
    """Chunks of a file, by the reader for its suffix. Raises what ``check_input`` raises."""
    check_input(path)
    return READERS[Path(path).suffix](str(path), field)

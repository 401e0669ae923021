"""Megatron's indexed corpora: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` says where sequences and documents begin.

The layout is megatron-core's (``core/datasets/indexed_dataset.py``), little-endian throughout::

    magic "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences S u64 | document indices D u64 (documents + 1)
    lengths int32[S] (tokens) | offsets int64[S] (bytes into .bin) | document indices int64[D] (into the sequences)

Core reads an index as it comes; here every number in it is checked against the files before a token is read, because
a damaged or mismatched index otherwise shows as strange text in the middle of a run.
"""

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from cpt_mega.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UINT16_VOCAB_LIMIT = 65500  # megatron-core's own limit (DType.optimal_dtype)
MAX_SEQUENCE_TOKENS = np.iinfo(np.int32).max


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron-LM stores tokens of such a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def corpus_files(prefix: str | os.PathLike) -> tuple[Path, Path]:
    """``(PREFIX.bin, PREFIX.idx)``."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedCorpus:
    """A memory-mapped corpus; opening it costs the index, reading it costs what is read.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        InputError: a file is missing, the index is not one, or what it says does not fit the files.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = str(prefix)
        self.dtype, lengths, offsets, document_indices = _read_index(self.prefix)
        # starts[i]: first token of document i within the .bin; one more entry closes the last document
        edges = np.append(offsets // self.dtype.itemsize, lengths.sum(dtype=np.int64))
        self._starts = edges[document_indices]
        self.tokens = int(edges[-1])
        self.documents = len(document_indices) - 1
        # An empty file cannot be mapped
        self._tokens = np.memmap(f"{self.prefix}.bin", self.dtype, "r") if self.tokens else np.empty(0, self.dtype)

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self._starts)

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last token of each document, int64 [documents] each; -1 where a document is empty."""
        found, filled = [], self.document_lengths > 0
        for places in (self._starts[:-1], self._starts[1:] - 1):
            tokens = np.full(self.documents, -1, np.int64)
            tokens[filled] = self._tokens[places[filled]]
            found.append(tokens)
        return found[0], found[1]

    def blocks(self, tokens: int = 1 << 22) -> Iterator[np.ndarray]:
        """All tokens in order, as stored, in blocks of so many."""
        for start in range(0, self.tokens, tokens):
            yield np.asarray(self._tokens[start : start + tokens])

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length`` of one document, a copy, int64 [length].

        Raises InputError when the document does not hold them.
        """
        if not 0 <= document < self.documents:
            raise InputError(f"{self.prefix}.idx document", document, f"the corpus holds {self.documents} documents")
        first = int(self._starts[document]) + start
        if start < 0 or length < 0 or first + length > self._starts[document + 1]:
            fix = f"document {document} holds {self.document_lengths[document]} tokens; plan over this very corpus"
            raise InputError(f"{self.prefix}.idx range", (start, length), fix)
        return self._tokens[first : first + length].astype(np.int64)


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Dtype, lengths [S], offsets [S] and document indices [D], checked against each other and against the files."""
    bin_path, idx_path = corpus_files(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise InputError("corpus", str(path), "no such file; give the path without .bin and .idx")
    dtype, sequences, indices = _read_header(idx_path)
    lengths_at, offsets_at = HEADER.size, HEADER.size + 4 * sequences
    raw = np.memmap(idx_path, np.uint8, "r")
    lengths = np.frombuffer(raw, "<i4", sequences, lengths_at)
    offsets = np.frombuffer(raw, "<i8", sequences, offsets_at)
    document_indices = np.frombuffer(raw, "<i8", indices, offsets_at + 8 * sequences)
    _check_sequences(bin_path, idx_path, dtype, lengths, offsets)
    _check_documents(idx_path, document_indices, sequences)
    return dtype, lengths, offsets, document_indices


def _read_header(idx_path: Path) -> tuple[np.dtype, int, int]:
    """Dtype, sequences, document indices; the file's size is what they ask for."""

    def refuse(value: object, fix: str) -> InputError:
        return InputError(str(idx_path), value, fix)

    with open(idx_path, "rb") as stream:
        head = stream.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise refuse(head[: len(MAGIC)], "not a Megatron .idx file; run tools/preprocess_data.py")
    if len(head) < HEADER.size:
        raise refuse(f"{len(head)} bytes", "the header is cut short; copy or preprocess the corpus again")
    _, version, code, sequences, indices = HEADER.unpack(head)
    if version != VERSION:
        raise refuse(f"version {version}", f"only version {VERSION} of the format exists in Megatron-LM")
    if code not in DTYPES:
        raise refuse(f"dtype code {code}", f"tokens are stored under one of the integer codes {sorted(DTYPES)}")
    size, expected = idx_path.stat().st_size, HEADER.size + 12 * sequences + 8 * indices
    if size == expected + sequences and sequences:
        raise refuse("modes", "a multimodal corpus (one mode per sequence); give a text corpus")
    if size != expected:
        raise refuse(f"{size} bytes", f"its header asks for {expected}; copy or preprocess the corpus again")
    return np.dtype(DTYPES[code]), sequences, indices


def _check_sequences(bin_path: Path, idx_path: Path, dtype: np.dtype, lengths: np.ndarray, offsets: np.ndarray) -> None:
    """Sequences lie one behind the other and fill the .bin exactly, as every Megatron writer leaves them."""
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0))
        raise InputError(str(idx_path), int(lengths[at]), f"sequence {at} has a negative length; preprocess again")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    wrong = offsets != ends - lengths.astype(np.int64) * dtype.itemsize
    if wrong.any():
        at = int(np.argmax(wrong))
        fix = f"sequence {at} does not begin where the one before it ends; preprocess again"
        raise InputError(str(idx_path), int(offsets[at]), fix)
    expected, size = int(ends[-1]) if len(ends) else 0, bin_path.stat().st_size
    if size != expected:
        fix = f"the index describes {expected} bytes; the two files are not of one corpus, or one was cut"
        raise InputError(str(bin_path), f"{size} bytes", fix)


def _check_documents(idx_path: Path, document_indices: np.ndarray, sequences: int) -> None:
    """Document indices run from 0 to the number of sequences without stepping back."""
    ends = (int(document_indices[0]), int(document_indices[-1])) if len(document_indices) else None
    if ends != (0, sequences):
        fix = f"document indices must run from 0 to the {sequences} sequences; the writer did not close its documents"
        raise InputError(str(idx_path), ends, fix)
    backward = np.diff(document_indices) < 0
    if backward.any():
        at = int(np.argmax(backward))
        raise InputError(str(idx_path), int(document_indices[at + 1]), f"document {at} ends before it begins")


class IndexedCorpusWriter:
    """Writes a corpus under temporary names and renames it at the end of a ``with`` block; nothing is left on error.

    Args:
        prefix: path without ``.bin`` and ``.idx``; its folder is made.
        dtype: how tokens are stored, one of Megatron's integer types (``token_dtype``).

    Raises:
        InputError: a token does not fit the dtype, or a document does not fit the format's int32 lengths.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.dtype | type):
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise InputError("dtype", str(self.dtype), f"give one of {', '.join(map(str, CODES))}")
        self.bin_path, self.idx_path = corpus_files(prefix)
        self.documents = self.tokens = 0
        self._content = hashlib.sha256()
        self._lengths: list[np.ndarray] = []

    def __enter__(self) -> "IndexedCorpusWriter":
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._bin, self._idx = _temporary_beside(self.bin_path), _temporary_beside(self.idx_path)
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error_type is None:
                self._commit()
        finally:
            for stream in (self._bin, self._idx):
                stream.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(stream.name)

    def add(self, tokens: np.ndarray | list[int]) -> None:
        """Appends one document of token ids [length]."""
        tokens = np.asarray(tokens)
        self.add_many(tokens, np.array([tokens.size]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents that lie one behind the other: token ids [sum of lengths], lengths [documents]."""
        if lengths.sum() != tokens.size:
            raise InputError("lengths", int(lengths.sum()), f"document lengths must sum to the {tokens.size} tokens")
        if lengths.max(initial=0) > MAX_SEQUENCE_TOKENS:
            fix = f"a document may hold {MAX_SEQUENCE_TOKENS} tokens in this format; split it"
            raise InputError("document length", int(lengths.max()), fix)
        self._write(self._bin, self._stored(tokens).tobytes())
        self._lengths.append(lengths.astype("<i4"))
        self.documents += len(lengths)
        self.tokens += tokens.size

    @property
    def content_digest(self) -> str:
        """SHA-256 over the bytes of ``.bin`` followed by those of ``.idx``, as hex; final after the ``with`` block."""
        return self._content.hexdigest()

    def _write(self, stream: tempfile._TemporaryFileWrapper, data: bytes) -> None:
        stream.write(data)
        self._content.update(data)

    def _stored(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.dtype == self.dtype or not tokens.size:
            return tokens.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise InputError("token id", low if low < limits.min else high, f"does not fit {self.dtype}")
        return tokens.astype(self.dtype)

    def _commit(self) -> None:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        self._write(self._idx, HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(lengths) + 1))
        for part in (lengths, np.cumsum(sizes) - sizes, np.arange(len(lengths) + 1, dtype="<i8")):
            self._write(self._idx, part.tobytes())
        for stream in (self._bin, self._idx):
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
        # Without an index there is no corpus: a reader never sees the new tokens under the old index.
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin.name, self.bin_path)
        os.replace(self._idx.name, self.idx_path)


def _temporary_beside(path: Path) -> tempfile._TemporaryFileWrapper:
    return tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False)

"""Writing what ``indexed`` reads: a corpus from arrays, and the index alone for tokens that lie in a file already."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cpt_mega.data.indexed import BLOCK_TOKENS, CODES, HEADER, MAGIC, VERSION, corpus_files
from cpt_mega.errors import InputError

MAX_SEQUENCE_TOKENS = np.iinfo(np.int32).max


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
        self.prefix = str(prefix)
        self.documents = self.tokens = 0
        self._lengths: list[np.ndarray] = []

    def __enter__(self) -> "IndexedCorpusWriter":
        self._bin, self._idx = (open_beside(path) for path in corpus_files(self.prefix))
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error_type is None:
                write_index(self._idx, self.dtype, lambda: self._lengths)
                for stream in (self._bin, self._idx):
                    stream.flush()
                    os.fsync(stream.fileno())
                install_corpus(self.prefix, self._bin.name, self._idx.name)
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
        check_lengths(lengths)
        self._bin.write(self._stored(tokens).tobytes())
        self._lengths.append(lengths.astype("<i4"))
        self.documents += len(lengths)
        self.tokens += tokens.size

    def _stored(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.dtype == self.dtype or not tokens.size:
            return tokens.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise InputError("token id", low if low < limits.min else high, f"does not fit {self.dtype}")
        return tokens.astype(self.dtype)


def check_lengths(lengths: np.ndarray) -> None:
    """Raises InputError when a document is longer than the format can say."""
    if lengths.max(initial=0) > MAX_SEQUENCE_TOKENS:
        fix = f"a document may hold {MAX_SEQUENCE_TOKENS} tokens in this format; split it"
        raise InputError("document length", int(lengths.max()), fix)


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Writes an ``.idx`` of one sequence a document; ``lengths`` gives blocks of int32 lengths anew at each call.

    No more than a block is in memory, so a corpus may have any number of documents.
    """
    documents = sum(len(block) for block in lengths())
    stream.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], documents, documents + 1))
    for block in lengths():
        stream.write(block.astype("<i4", copy=False).tobytes())
    offset, size = 0, np.dtype(dtype).itemsize
    for block in lengths():
        ends = offset + np.cumsum(block, dtype="<i8") * size
        stream.write((ends - block.astype("<i8") * size).tobytes())
        offset = int(ends[-1]) if len(ends) else offset
    for first in range(0, documents + 1, BLOCK_TOKENS):
        stream.write(np.arange(first, min(first + BLOCK_TOKENS, documents + 1), dtype="<i8").tobytes())


def install_corpus(prefix: str | os.PathLike, bin_file: str | os.PathLike, idx_file: str | os.PathLike) -> None:
    """Renames finished files to ``PREFIX.bin`` and ``PREFIX.idx``.

    Without an index there is no corpus: a reader never sees the new tokens under the old index.
    """
    bin_path, idx_path = corpus_files(prefix)
    for path in (bin_file, idx_file):
        os.chmod(path, 0o644)
    idx_path.unlink(missing_ok=True)
    os.replace(bin_file, bin_path)
    os.replace(idx_file, idx_path)


def open_beside(path: Path) -> tempfile._TemporaryFileWrapper:
    """A temporary file in the folder of ``path``, which is made; to be renamed to it or removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False)

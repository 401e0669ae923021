"""Megatron's indexed corpora: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` says where sequences and documents begin.

The layout is megatron-core's (``core/datasets/indexed_dataset.py``), little-endian throughout::

    magic "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences S u64 | document indices D u64 (documents + 1)
    lengths int32[S] (tokens) | offsets int64[S] (bytes into .bin) | document indices int64[D] (into the sequences)

Core reads an index as it comes; here every number in it is checked against the files before a token is read, because
a damaged or mismatched index otherwise shows as strange text in the middle of a run.
"""

import hashlib
import os
import struct
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from cpt_mega.errors import FaultError, InputError
from cpt_mega.lineage import is_local_name, read_json

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UINT16_VOCAB_LIMIT = 65500  # megatron-core's own limit (DType.optimal_dtype)
BLOCK_DOCUMENTS = 1 << 20  # whose lengths are looked at at once
BLOCK_TOKENS = 1 << 22  # of a block that is read, hashed or written at once


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron-LM stores tokens of such a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def corpus_files(prefix: str | os.PathLike) -> tuple[Path, Path]:
    """``(PREFIX.bin, PREFIX.idx)``."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def mask_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.mask.bin``: a byte a token, 1 where it counts for the loss as a target; absent where all do."""
    return Path(f"{prefix}.mask.bin")


def documents_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.documents.jsonl``: a line about each document, in order, where the inputs were folders."""
    return Path(f"{prefix}.documents.jsonl")


def shards_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.shards.json``: the names of the shards of a corpus that lies in several, as a list."""
    return Path(f"{prefix}.shards.json")


def plans_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.plans``: the folder of the packing plans of a large corpus."""
    return Path(f"{prefix}.plans")


def parts_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.parts``: the folder of a corpus that is being made."""
    return Path(f"{prefix}.parts")


class IndexedCorpus:
    """A corpus whose index is mapped into memory; opening it costs the index, reading it costs what is read.

    It lies in one pair of files, or in several that ``PREFIX.shards.json`` names, one behind the other; no document
    crosses from one to the next.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        InputError: a file is missing, the index is not one, or what it says does not fit the files.
        FaultError: when tokens are read, that a file was cut since.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = str(prefix)
        self.shards = [_Shard(shard) for shard in shard_prefixes(self.prefix)]
        self.dtype, self.has_mask = self.shards[0].dtype, self.shards[0].mask is not None
        for shard in self.shards:
            if (shard.dtype, shard.mask is not None) != (self.dtype, self.has_mask):
                fix = f"its dtype or its loss mask differs from those of {self.shards[0].prefix}; preprocess it again"
                raise InputError(str(shards_path(self.prefix)), shard.prefix, fix)
        self._first_documents = np.cumsum([0, *(shard.documents for shard in self.shards)]).tolist()
        self.documents = self._first_documents[-1]
        self.tokens = sum(shard.tokens for shard in self.shards)

    def check_unchanged(self) -> None:
        """Raises FaultError when a file is not the one that was opened any more: replaced, written to, cut or gone."""
        for shard in self.shards:
            shard.check_unchanged()

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]; held from then on, which for very many documents is much."""
        return np.concatenate(list(self.length_blocks()))

    def length_blocks(self) -> Iterator[np.ndarray]:
        """``document_lengths`` in blocks that are not kept."""
        for shard in self.shards:
            yield np.empty(0, np.int64)
            for low in range(0, shard.documents, BLOCK_DOCUMENTS):
                yield np.diff(shard.starts(low, min(low + BLOCK_DOCUMENTS, shard.documents)))

    def length_of(self, document: int) -> int:
        """Tokens of one document. Raises InputError when there is none of that number."""
        shard, within = self._shard_of(document)
        return shard.start(within + 1) - shard.start(within)

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last token of each document, int64 [documents] each; -1 where a document is empty."""
        return tuple(np.concatenate(parts) for parts in zip(*(shard.ends() for shard in self.shards), strict=True))

    def blocks(self, tokens: int = BLOCK_TOKENS) -> Iterator[np.ndarray]:
        """All tokens in order, as stored, in blocks of at most so many."""
        for shard in self.shards:
            for start in range(0, shard.tokens, tokens):
                yield shard.ids.read(start, min(start + tokens, shard.tokens))

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Tokens ``start`` to ``start + length`` of one document, a copy, int64 [length].

        Raises InputError when the document does not hold them.
        """
        shard, first = self._place(document, start, length)
        return shard.ids.read(first, first + length).astype(np.int64)

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """1 for each of the tokens that ``read`` gives that counts for the loss as a target, uint8 [length].

        All ones where the corpus has no mask. Raises InputError when the document does not hold them.
        """
        shard, first = self._place(document, start, length)
        return np.ones(length, np.uint8) if shard.mask is None else shard.mask.read(first, first + length)

    def digest_part(self, first: int, documents: int) -> str:
        """``PartDigest`` of so many documents from the first on, as they are stored; they may lie in several shards."""
        digest, last = PartDigest(), first + documents
        for shard, begin in zip(self.shards, self._first_documents, strict=False):
            low, high = max(first, begin) - begin, min(last, begin + shard.documents) - begin
            if low < high:
                shard.add_to(digest, low, high)
        return digest.hexdigest()

    def _shard_of(self, document: int) -> tuple["_Shard", int]:
        """The shard a document is in, and its number there."""
        if not 0 <= document < self.documents:
            raise InputError(f"{self.prefix}.idx document", document, f"the corpus holds {self.documents} documents")
        index = bisect_right(self._first_documents, document) - 1
        return self.shards[index], document - self._first_documents[index]

    def _place(self, document: int, start: int, length: int) -> tuple["_Shard", int]:
        """The shard a document is in, and the place of its token ``start`` there."""
        shard, within = self._shard_of(document)
        first = shard.start(within) + start
        if start < 0 or length < 0 or first + length > shard.start(within + 1):
            fix = f"document {document} holds {self.length_of(document)} tokens; plan over this very corpus"
            raise InputError(f"{self.prefix}.idx range", (start, length), fix)
        return shard, first


class _Shard:
    """One ``.bin`` and ``.idx``, with its ``.mask.bin`` if there is one.

    The index stays on disk, mapped: for a hundred million documents it is gigabytes, in each process of a machine.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        paths = (*corpus_files(prefix), mask_path(prefix))
        self._stamps = {path: _stamp(path) for path in paths}  # before anything is read
        self.dtype, self._offsets, self._sequences, self.tokens = _read_index(prefix)
        self.documents = len(self._sequences) - 1
        self.ids = _Stored(corpus_files(prefix)[0], self.dtype)
        self.mask = self._open_mask(mask_path(prefix))

    def check_unchanged(self) -> None:
        """See IndexedCorpus."""
        for path, opened in self._stamps.items():
            if _stamp(path) != opened:
                said = "is gone" if not path.exists() else "is not the file any more that the run opened"
                raise FaultError(
                    f"{path} {said}: it was replaced, written to or cut while the run read it, so what was saved last is the "
                    "last that is known to be of the corpus; bring the file back, or begin a new run on the new one"
                )

    def start(self, document: int) -> int:
        """The first token of a document; that of the one behind the last is the number of tokens."""
        sequence = int(self._sequences[document])
        return int(self._offsets[sequence]) // self.dtype.itemsize if sequence < len(self._offsets) else self.tokens

    def starts(self, low: int, high: int) -> np.ndarray:
        """``start`` of documents ``low`` to ``high``, this one included, int64."""
        sequences = self._sequences[low : high + 1]
        behind = sequences == len(self._offsets)
        if behind.all():
            return np.full(len(sequences), self.tokens, np.int64)
        starts = self._offsets[np.where(behind, 0, sequences)] // self.dtype.itemsize
        return np.where(behind, self.tokens, starts)

    def starts_among(self, first: int, last: int) -> np.ndarray:
        """The tokens from ``first`` to before ``last`` that a document begins with, by their places, int64, ascending."""
        low, high = (bisect_left(range(self.documents + 1), place, key=self.start) for place in (first, last))
        return self.starts(low, high - 1)

    def _open_mask(self, path: Path) -> "_Stored | None":
        if not path.is_file():
            return None
        if path.stat().st_size != self.tokens:
            fix = f"a loss mask holds a byte for each of the {self.tokens} tokens; preprocess again"
            raise InputError(str(path), f"{path.stat().st_size} bytes", fix)
        return _Stored(path, np.dtype(np.uint8))

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """See IndexedCorpus."""
        starts = self.starts(0, self.documents)
        found, filled = [], np.diff(starts) > 0
        ids = np.memmap(self.ids.path, self.dtype, "r") if self.tokens else np.empty(0, self.dtype)
        for places in (starts[:-1], starts[1:] - 1):
            tokens = np.full(self.documents, -1, np.int64)
            tokens[filled] = ids[places[filled]]
            found.append(tokens)
        return found[0], found[1]

    def add_to(self, digest: "PartDigest", low: int, high: int) -> None:
        """Documents ``low`` to ``high`` of this shard."""
        starts = self.starts(low, high)
        end = int(starts[-1])
        for first in range(int(starts[0]), end, BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, end)
            digest.add(self.ids.read(first, last), None if self.mask is None else self.mask.read(first, last))
        digest.add_lengths(np.diff(starts))


class PartDigest:
    """SHA-256 of a part of a corpus: over the digests of its tokens as stored, its lengths (int32) and its mask, if any.

    It does not depend on how the part is cut into blocks or files.
    """

    def __init__(self):
        self._tokens, self._lengths, self._mask = hashlib.sha256(), hashlib.sha256(), None

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Tokens in the corpus' dtype, and their mask."""
        self._tokens.update(np.ascontiguousarray(tokens))
        if mask is not None:
            self._mask = self._mask or hashlib.sha256()
            self._mask.update(np.ascontiguousarray(mask))

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Tokens of each document."""
        self._lengths.update(lengths.astype("<i4"))

    def hexdigest(self) -> str:
        """Of everything added so far."""
        parts = [self._tokens, self._lengths, *([self._mask] if self._mask else [])]
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


class _Stored:
    """Numbers in a file that stays open, read by their place.

    Not mapped: where a mapped file was cut, the process that looks there is ended by a signal, without a word.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self._dtype = path, dtype
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, first: int, last: int) -> np.ndarray:
        """Numbers ``first`` to ``last``, a copy. Raises FaultError when the file ends before."""
        numbers = np.empty(last - first, self._dtype)
        left, offset = memoryview(numbers).cast("B") if numbers.size else memoryview(b""), first * self._dtype.itemsize
        while left:
            count = os.preadv(self._file, [left], offset)
            if count == 0:
                raise FaultError(
                    f"{self.path} was cut while it was read: it ends at byte {offset}; bring the file back"
                )
            left, offset = left[count:], offset + count
        return numbers


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """By which a file is known to be the same and unchanged; None when there is none. A copy has another."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def has_corpus(prefix: str | os.PathLike) -> bool:
    """Whether a corpus stands under a prefix; without an index there is none."""
    return corpus_files(prefix)[1].exists() or shards_path(prefix).exists()


def shard_prefixes(prefix: str) -> list[str]:
    """The prefixes of the files that hold a corpus: itself, or those that ``PREFIX.shards.json`` names beside it.

    Raises InputError when that file is not a list of names, or they lie elsewhere.
    """
    path = shards_path(prefix)
    if corpus_files(prefix)[1].is_file() or not path.is_file():
        return [prefix]
    try:
        names = read_json(path)
    except (ValueError, OSError) as error:
        raise InputError("shards", str(path), f"cannot be read ({error}); run tools/merge_shards.py again") from error
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise InputError("shards", str(path), "is not a list of names; run tools/merge_shards.py again")
    outside = [name for name in names if not is_local_name(name)]
    if outside:
        fix = f"names {outside[0]!r}, which is not beside it; run tools/merge_shards.py again"
        raise InputError("shards", str(path), fix)
    return [str(path.parent / name) for name in names]


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, int]:
    """Dtype, offsets [S] and document indices [D], mapped and checked against each other and the files; tokens in all."""
    bin_path, idx_path = corpus_files(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            unfinished = f"it is not finished ({parts_path(prefix)} is there); run tools/preprocess_data.py again"
            fix = unfinished if parts_path(prefix).is_dir() else "tools/preprocess_data.py makes it"
            raise InputError("corpus", str(path), f"no such file; {fix}")
    dtype, sequences, indices = _read_header(idx_path)
    lengths_at, offsets_at = HEADER.size, HEADER.size + 4 * sequences
    raw = np.memmap(idx_path, np.uint8, "r")
    lengths = np.frombuffer(raw, "<i4", sequences, lengths_at)
    offsets = np.frombuffer(raw, "<i8", sequences, offsets_at)
    document_indices = np.frombuffer(raw, "<i8", indices, offsets_at + 8 * sequences)
    tokens = _check_sequences(bin_path, idx_path, dtype, lengths, offsets)
    _check_documents(idx_path, document_indices, sequences)
    return dtype, offsets, document_indices, tokens


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


def _check_sequences(bin_path: Path, idx_path: Path, dtype: np.dtype, lengths: np.ndarray, offsets: np.ndarray) -> int:
    """Sequences lie one behind the other and fill the .bin exactly, as every Megatron writer leaves them; their tokens."""
    end = 0
    for low in range(0, len(lengths), BLOCK_DOCUMENTS):
        block = lengths[low : low + BLOCK_DOCUMENTS].astype(np.int64)
        if (block < 0).any():
            at = int(np.argmax(block < 0))
            fix = f"sequence {low + at} has a negative length; preprocess again"
            raise InputError(str(idx_path), int(block[at]), fix)
        ends = end + np.cumsum(block) * dtype.itemsize
        wrong = offsets[low : low + BLOCK_DOCUMENTS] != ends - block * dtype.itemsize
        if wrong.any():
            at = int(np.argmax(wrong))
            fix = f"sequence {low + at} does not begin where the one before it ends; preprocess again"
            raise InputError(str(idx_path), int(offsets[low + at]), fix)
        end = int(ends[-1])
    size = bin_path.stat().st_size
    if size != end:
        fix = f"the index describes {end} bytes; the two files are not of one corpus, or one was cut"
        raise InputError(str(bin_path), f"{size} bytes", fix)
    return end // dtype.itemsize


def _check_documents(idx_path: Path, document_indices: np.ndarray, sequences: int) -> None:
    """Document indices run from 0 to the number of sequences without stepping back."""
    ends = (int(document_indices[0]), int(document_indices[-1])) if len(document_indices) else None
    if ends != (0, sequences):
        fix = f"document indices must run from 0 to the {sequences} sequences; the writer did not close its documents"
        raise InputError(str(idx_path), ends, fix)
    for low in range(0, len(document_indices), BLOCK_DOCUMENTS):
        backward = np.diff(document_indices[low : low + BLOCK_DOCUMENTS + 1]) < 0
        if backward.any():
            at = low + int(np.argmax(backward))
            raise InputError(str(idx_path), int(document_indices[at + 1]), f"document {at} ends before it begins")

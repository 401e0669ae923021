"""Packing documents into rows of the context window: which tokens of which documents stand in which row.

A plan is made once from the documents' lengths alone; it holds no tokens and knows no order of training.
``best_fit`` is best-fit-decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830): only documents
longer than a row are split. ``concat`` is the classic concatenate-and-chunk, which cuts wherever a row ends.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpt_mega.errors import InputError


@dataclass(frozen=True)
class RowPlan:
    """Rows as flat arrays; row r is made of the pieces ``row_offsets[r]`` to ``row_offsets[r + 1]``.

    Attributes:
        seq_length: tokens a row has room for.
        row_offsets: int64 [rows + 1], into the pieces.
        document, start, length: [pieces], the document of a piece, its first token there, its tokens (all > 0).
    """

    seq_length: int
    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def rows(self) -> int:
        """Rows in the plan."""
        return len(self.row_offsets) - 1

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Real tokens of each row, int64 [rows]."""
        if not self.rows:
            return np.empty(0, np.int64)
        return np.add.reduceat(self.length.astype(np.int64), self.row_offsets[:-1])

    @property
    def fill(self) -> float:
        """Share of the rows' room that real tokens take; 1.0 for a plan without rows."""
        return float(self.row_tokens.sum() / (self.rows * self.seq_length)) if self.rows else 1.0

    @property
    def split_documents(self) -> int:
        """Documents in more than one piece."""
        return int(np.unique(self.document[self.start > 0]).size)

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """``(document, start, length)`` of each piece of a row, in their order."""
        span = slice(self.row_offsets[row], self.row_offsets[row + 1])
        return list(zip(*(part[span].tolist() for part in (self.document, self.start, self.length)), strict=True))


def plan_rows(document_lengths: np.ndarray, seq_length: int, method: str = "best_fit") -> RowPlan:
    """Packs documents of the given token counts [documents] into rows; every token lands in exactly one row.

    Deterministic: equal lengths give an equal plan. Documents without tokens take no place.
    Raises InputError for an unknown method or a row without room.
    """
    if method not in METHODS:
        raise InputError("data.packing", method, f"give one of {', '.join(METHODS)}")
    if seq_length < 1:
        raise InputError("train.seq_length", seq_length, "a row needs room for at least one token")
    return METHODS[method](np.asarray(document_lengths, dtype=np.int64), seq_length)


def _concat(lengths: np.ndarray, seq_length: int) -> RowPlan:
    present = np.flatnonzero(lengths)
    ends = np.cumsum(lengths[present])
    total = int(ends[-1]) if ends.size else 0
    row_starts = np.arange(0, total, seq_length)
    document_starts = ends - lengths[present]
    # both are sorted: a stable sort only merges them, and takes a tenth of union1d's time
    cuts = np.sort(np.concatenate([document_starts, row_starts]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    owner = np.searchsorted(document_starts, cuts, side="right") - 1
    return _plan(
        seq_length,
        row_offsets=np.append(np.searchsorted(cuts, row_starts), len(cuts)),
        document=present[owner],
        start=cuts - document_starts[owner],
        length=np.diff(cuts, append=total),
    )


def _best_fit(lengths: np.ndarray, seq_length: int) -> RowPlan:
    whole_rows = lengths // seq_length
    full_document = np.repeat(np.arange(len(lengths)), whole_rows)
    nth = np.arange(len(full_document)) - np.repeat(np.cumsum(whole_rows) - whole_rows, whole_rows)
    rest = lengths - whole_rows * seq_length
    items = np.flatnonzero(rest)
    # descending; numpy sorts 16-bit keys by radix, several times faster
    descending = (seq_length - rest[items]).astype(np.min_scalar_type(seq_length))
    items = items[np.argsort(descending, kind="stable")]
    row = _best_fit_rows(rest[items], seq_length)
    in_row_order = np.argsort(row, kind="stable")
    items, row = items[in_row_order], row[in_row_order]
    full = len(full_document)
    packed_offsets = np.flatnonzero(np.diff(row, prepend=-1))
    return _plan(
        seq_length,
        row_offsets=np.concatenate([np.arange(full), full + packed_offsets, [full + len(items)]]),
        document=np.concatenate([full_document, items]),
        start=np.concatenate([nth * seq_length, whole_rows[items] * seq_length]),
        length=np.concatenate([np.full(full, seq_length), rest[items]]),
    )


def _best_fit_rows(sizes: np.ndarray, seq_length: int) -> np.ndarray:
    """The row of each item [items]; sizes come in descending order and fit a row."""
    if not sizes.size:
        return np.empty(0, np.int64)
    run_starts = np.flatnonzero(np.diff(sizes, prepend=-1))
    counts = np.diff(run_starts, append=len(sizes))
    open_rows = _OpenRows(seq_length)
    placed = [open_rows.place(*run) for run in zip(sizes[run_starts].tolist(), counts.tolist(), strict=True)]
    return np.concatenate(placed)


class _OpenRows:
    """Rows with room left, grouped by how much of it, so that a run of equal items is placed a group at a time.

    Placing equal items one by one by best fit fills the tightest row that takes them as far as it goes and then turns
    to the next tightest: rows with the same room can be treated at once, and the work grows with distinct sizes.
    """

    def __init__(self, seq_length: int):
        self.seq_length, self.rows = seq_length, 0
        self._rooms: list[int] = []  # distinct room left, ascending
        self._groups: dict[int, deque[np.ndarray]] = {}

    def place(self, size: int, count: int) -> np.ndarray:
        """The row of each of ``count`` items of ``size`` tokens, int64 [count]."""
        placed = []
        while count:
            room, rows = self._tightest(size, count)
            per_row = room // size
            used = min(len(rows), count // per_row)
            placed.append(np.repeat(rows[:used], per_row))
            self._put(room - per_row * size, rows[:used])
            count -= used * per_row
            if used < len(rows) and count:  # fewer items are left than one row takes
                placed.append(np.repeat(rows[used], count))
                self._put(room - count * size, rows[used : used + 1])
                used, count = used + 1, 0
            self._put(room, rows[used:])
        return np.concatenate(placed)

    def _tightest(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """Takes out rows with the least room that holds ``size``; opens as many as ``count`` items need if none is."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            opened = -(-count // (self.seq_length // size))
            self.rows += opened
            return self.seq_length, np.arange(self.rows - opened, self.rows)
        room = self._rooms[at]
        rows = self._groups[room].popleft()
        if not self._groups[room]:
            del self._groups[room], self._rooms[at]
        return room, rows

    def _put(self, room: int, rows: np.ndarray) -> None:
        if not room or not rows.size:
            return
        if room not in self._groups:
            self._groups[room] = deque()
            insort(self._rooms, room)
        self._groups[room].append(rows)


def _plan(seq_length: int, row_offsets: np.ndarray, **pieces: np.ndarray) -> RowPlan:
    """A plan with its pieces in the narrowest type that holds them: 12 bytes a piece but for giant corpora."""
    return RowPlan(seq_length, row_offsets.astype(np.int64), **{name: _narrow(part) for name, part in pieces.items()})


def _narrow(part: np.ndarray) -> np.ndarray:
    return part.astype(np.int32 if part.max(initial=0) <= np.iinfo(np.int32).max else np.int64)


METHODS: dict[str, Callable[[np.ndarray, int], RowPlan]] = {"best_fit": _best_fit, "concat": _concat}

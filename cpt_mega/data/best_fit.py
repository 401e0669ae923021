"""Which row each document goes to: best-fit-decreasing over runs of equal lengths, in numpy.

"Fewer Truncations Improve Language Modeling" (arXiv 2404.10830) packs by best-fit-decreasing with a tree, an item at a
time. Lengths are small integers, so equal ones come in long runs, and a run is placed a group of equal rows at a time.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

import numpy as np

ROW_TYPE = np.int32  # rows of one corpus; half the memory of numpy's own


def best_fit_rows(sizes: np.ndarray, seq_length: int) -> np.ndarray:
    """The row of each item, int32 [items]; rows count from 0.

    Args:
        sizes: in descending order, from 1 to ``seq_length``.
    """
    return place_all(OpenRows(seq_length), sizes)


def place_all(open_rows: "OpenRows", sizes: np.ndarray) -> np.ndarray:
    """The rows of descending sizes, int32 [items]."""
    placed = [open_rows.place(size, count) for size, count in _runs(sizes)]
    return np.concatenate(placed) if placed else np.empty(0, ROW_TYPE)


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Indices that sort keys, from 0 to below 2^31, upwards; equal ones keep their order. int32, for at most 2^31 keys."""
    # numpy sorts numbers with vector instructions and finds stable orders without: key and index as one number
    together = keys.astype(np.int64)
    together <<= 32
    together |= np.arange(len(keys), dtype=np.int32)
    together.sort()
    return together.astype(np.uint32).view(np.int32)  # of new memory the pages are what takes time


def _runs(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(sizes, prepend=sizes.dtype.type(0)))
    return zip(sizes[starts].tolist(), np.diff(starts, append=len(sizes)).tolist(), strict=True)


class OpenRows:
    """Rows with room left, grouped by how much of it, so that a run of equal items is placed a group at a time.

    Placing equal items one by one by best fit fills the tightest row that takes them as far as it goes and then turns
    to the next tightest: rows with the same room can be treated at once, and the work grows with distinct sizes.

    Args:
        rooms: tokens left in each row that is there already [rows].
    """

    def __init__(self, seq_length: int, rooms: np.ndarray | None = None):
        self.seq_length, self.rows = seq_length, 0
        self._rooms: list[int] = []  # distinct room left, ascending
        self._groups: dict[int, deque[np.ndarray]] = {}
        if rooms is not None and rooms.size:
            self._take_up(rooms)

    def place(self, size: int, count: int) -> np.ndarray:
        """The row of each of ``count`` items of ``size`` tokens, int32 [count]."""
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

    def _take_up(self, rooms: np.ndarray) -> None:
        self.rows = len(rooms)
        order = stable_order(rooms)
        starts = np.flatnonzero(np.diff(rooms[order], prepend=-1))
        for room, rows in zip(rooms[order[starts]].tolist(), np.split(order, starts[1:]), strict=True):
            self._put(room, rows)

    def _tightest(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """Takes out rows with the least room that holds ``size``; opens as many as ``count`` items need if none is."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            opened = -(-count // (self.seq_length // size))
            self.rows += opened
            return self.seq_length, np.arange(self.rows - opened, self.rows, dtype=ROW_TYPE)
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

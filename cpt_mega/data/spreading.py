"""Small documents spread over many rows, where best fit puts hundreds of them into one.

Best-fit-decreasing places the smallest documents last, when all other rows are full: they end in rows of their own, of
hundreds of documents each. Such rows are taken apart, together with others that hold few documents, and packed anew so
that each gets some of the small ones: large documents by best fit into rows that keep room for them, then the small ones
in turn, the largest to the rows with most room, and the last few of each row by best fit, which fills it. What is too much
in a row even then gets rows of its own, where these are few enough.
"""

import numpy as np

from cpt_mega.data.best_fit import ROW_TYPE, OpenRows, best_fit_rows, place_all, stable_order

FILL = 0.999  # spreading ends where rows would be less full than this, or than best fit leaves them
ROOMY, DENSE = (
    0.6,
    0.8,
)  # documents that rows are packed anew with, of those they may hold; the second for dense corpora
ATTEMPTS, FAILURES = 32, 5
MORE = 1.25  # documents more that a row may hold, once it has failed so often with fewer
SMALL = 1 / 16  # of a row
LAST = 4  # documents a row that are placed by best fit at the end
TURNS = 4  # each gives small documents to a quarter of the rows, those with most room


def spread_small(sizes: np.ndarray, rows: np.ndarray, seq_length: int, most: int) -> np.ndarray:
    """Rows in which at most ``most`` documents stand, as far as the fill allows, int32 [items]; rows count from 0.

    Args:
        sizes: in descending order, from 1 to ``seq_length``.
        rows: of each item, by best fit.
        most: documents a row may hold; more where the documents are too small for that on average.
    """
    plan = _Rows(sizes, rows, seq_length)
    least_fill = min(FILL, plan.fill)
    most = max(most, -(-len(sizes) // max(plan.used, 1)))
    limit, failures = most, 0
    for _ in range(ATTEMPTS):
        if not (plan.documents > most).any():
            break
        if plan.repack(most, failures, (plan.fill + least_fill) / 2):  # half of what may be lost is for later ones
            failures = 0
        elif failures < FAILURES:
            failures += 1
        else:
            most, failures = int(most * MORE) + 1, 0
    # where best fit fills less than that, a row in a thousand more is no loss either
    plan.open_rows_for_the_rest(limit, least_fill if least_fill == FILL else least_fill * FILL)
    return plan.numbered()


class _Rows:
    """Items in rows, some of which may have become empty.

    Attributes:
        sizes, rows: of each item [items].
        documents: of each row [rows].
    """

    def __init__(self, sizes: np.ndarray, rows: np.ndarray, seq_length: int):
        self.sizes, self.rows, self.seq_length = sizes, rows.copy(), seq_length
        self.documents, self.tokens = np.bincount(rows), int(sizes.sum(dtype=np.int64))

    @property
    def used(self) -> int:
        """Rows that hold any."""
        return int(np.count_nonzero(self.documents))

    @property
    def fill(self) -> float:
        """Share of the used rows' room that is taken."""
        return self.tokens / (self.used * self.seq_length) if self.used else 1.0

    def numbered(self) -> np.ndarray:
        """The row of each item, with the empty rows left out."""
        return (np.cumsum(self.documents > 0, dtype=ROW_TYPE) - 1)[self.rows]

    def repack(self, most: int, failures: int, least_fill: float) -> bool:
        """Packs the rows that hold too many documents, and some that hold few, anew; whether that made it better.

        Nothing changes if it did not.
        """
        chosen = self._chosen(most, failures)
        marked = np.zeros(len(self.documents), bool)
        marked[chosen] = True
        items = np.flatnonzero(marked[self.rows])
        packed = _pack(self.sizes[items], self.seq_length, most)
        documents = np.bincount(packed, minlength=len(chosen))
        used = self.used - np.count_nonzero(self.documents[chosen]) + np.count_nonzero(documents)
        if _excess(documents, most) >= _excess(self.documents[chosen], most):
            return False
        if self.tokens < least_fill * used * self.seq_length:
            return False
        new = np.arange(len(self.documents), len(self.documents) + len(documents) - len(chosen))
        places = np.concatenate([chosen, new]).astype(ROW_TYPE)
        self.rows[items] = places[packed]
        self.documents = np.concatenate([self.documents, np.zeros(len(new), np.int64)])
        self.documents[places] = documents
        return True

    def _chosen(self, most: int, failures: int) -> np.ndarray:
        """Rows with too many documents, and as many others as bring their mean down; more of them after failures."""
        over = np.flatnonzero(self.documents > most)
        dense = len(self.sizes) > ROOMY * most * self.used
        wanted = (DENSE if dense else ROOMY) * most
        others = np.flatnonzero((self.documents > 0) & (self.documents <= wanted))
        if not others.size:
            return over
        too_many = self.documents[over].sum() - wanted * len(over)
        few = max(wanted - self.documents[others].mean(), 1e-9)
        count = int(min(len(others), max(np.ceil(too_many / few), LAST) * 2**failures))
        # from all over the others, so that lengths are as mixed as in the whole
        return np.concatenate([over, others[(np.arange(count) * len(others) + failures) // count % len(others)]])

    def open_rows_for_the_rest(self, most: int, least_fill: float) -> None:
        """Moves what is too much in a row, the smallest, into rows of their own, as far as the fill allows.

        A document that ``most`` others of its row are larger than is less than that part of a row: so many fit into one.
        """
        over = self.documents > most
        if not over.any():
            return
        items = np.flatnonzero(over[self.rows])
        items = items[stable_order(self.rows[items])]
        rank = np.arange(len(items)) - np.searchsorted(self.rows[items], self.rows[items])
        moved = items[rank >= most][stable_order(rank.max() - rank[rank >= most])]  # from the worst rows first
        allowed = int(self.tokens / (least_fill * self.seq_length)) - self.used
        moved = moved[: max(0, allowed) * most]
        self.rows[moved] = len(self.documents) + np.arange(len(moved)) // most
        self.documents = np.bincount(self.rows)


def _excess(documents: np.ndarray, most: int) -> int:
    """Documents that stand in rows beyond what these may hold."""
    return int(np.maximum(documents - most, 0).sum())


def _tokens(sizes: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(rows, weights=sizes, minlength=count).astype(np.int64)


def _pack(sizes: np.ndarray, seq_length: int, most: int) -> np.ndarray:
    """The row of each item; sizes in descending order."""
    row_count = -(-int(sizes.sum()) // seq_length)
    large = _count_of_large(sizes, seq_length, row_count)
    rows = np.empty(len(sizes), ROW_TYPE)
    rows[:large] = _large_rows(sizes[:large], seq_length, row_count, int(sizes[large:].sum()) // row_count)
    row_count = max(row_count, int(rows[:large].max(initial=-1)) + 1)
    documents = np.bincount(rows[:large], minlength=row_count)
    rooms = seq_length - _tokens(sizes[:large], rows[:large], row_count)
    turns_end = max(large, len(sizes) - LAST * row_count)
    in_turn = _in_turn(sizes[large:turns_end], rooms, documents, most - LAST // 2)
    rows[large:turns_end] = in_turn
    left = np.concatenate([large + np.flatnonzero(in_turn < 0), np.arange(turns_end, len(sizes))])
    rows[left] = place_all(OpenRows(seq_length, rooms), sizes[left])
    return rows


def _count_of_large(sizes: np.ndarray, seq_length: int, row_count: int) -> int:
    last = int(sizes[max(0, len(sizes) - LAST * row_count)])
    small = min(seq_length // 2, max(int(seq_length * SMALL), last))
    return int(np.searchsorted(-sizes, -small, side="left"))


def _large_rows(sizes: np.ndarray, seq_length: int, row_count: int, reserve: int) -> np.ndarray:
    """Best fit into rows that keep a reserve; a smaller one when more than ``row_count`` rows would be opened."""
    capacity = seq_length - reserve
    while True:
        alone = int(np.searchsorted(-sizes, -capacity, side="left"))  # larger than the rest of a row
        rows = np.concatenate([np.arange(alone, dtype=ROW_TYPE), alone + best_fit_rows(sizes[alone:], capacity)])
        opened = int(rows.max(initial=-1)) + 1
        if opened <= row_count or capacity == seq_length:
            return rows
        capacity = min(seq_length, capacity * opened // row_count + 1)


def _in_turn(sizes: np.ndarray, rooms: np.ndarray, documents: np.ndarray, most: int) -> np.ndarray:
    """Gives an item to each of the rows with most room, again and again; -1 for items that did not fit.

    ``rooms`` and ``documents`` of the rows are kept up.
    """
    rows, at, share = np.full(len(sizes), -1, ROW_TYPE), 0, max(1, len(rooms) // TURNS)
    while at < len(sizes):
        order = stable_order(rooms.max() - rooms)
        takers = order[documents[order] < most][: min(share, len(sizes) - at)]
        if not takers.size:
            break
        some = sizes[at : at + len(takers)]
        fits = some <= rooms[takers]
        rows[at : at + len(takers)] = np.where(fits, takers, -1)
        rooms[takers[fits]] -= some[fits]
        documents[takers[fits]] += 1
        at += len(takers)
    return rows

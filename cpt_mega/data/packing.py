"""Packing documents into rows of the context window: which tokens of which documents stand in which row.

A plan is made once from the documents' lengths alone; it holds no tokens and knows no order of training.
``best_fit`` splits only documents longer than a row (``best_fit.py``), and lets no row hold many more documents than others
where the lengths allow it (``spreading.py``). ``concat`` is the classic concatenate-and-chunk, which cuts wherever a row
ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpt_mega.data.best_fit import best_fit_rows, stable_order
from cpt_mega.data.spreading import spread_small
from cpt_mega.errors import InputError

PACKING_VERSION = 2  # another one where the same lengths give another plan
MOST_ROW_TOKENS = 1 << 30
BEST_FIT, CONCAT = "best_fit", "concat"
TOKENS_A_DOCUMENT = 128  # a row of so many times n tokens holds at most n documents, where their lengths allow it


@dataclass(frozen=True)
class PlanStatistics:
    """What packing does to a corpus.

    Attributes:
        rows: of the plan.
        tokens, padding: real ones, and room that none takes.
        documents, split_documents: that stand in rows, and in more than one.
        documents_a_row, documents_a_row_p99, most_documents: mean, 99th percentile and most in one row; a piece of a
            document is one.
    """

    rows: int
    tokens: int
    padding: int
    documents: int
    split_documents: int
    documents_a_row: float
    documents_a_row_p99: int
    most_documents: int

    @property
    def fill(self) -> float:
        """Share of the rows' room that real tokens take; 1.0 for a plan without rows."""
        return self.tokens / (self.tokens + self.padding) if self.rows else 1.0


@dataclass(frozen=True)
class RowPlan:
    """Rows as flat arrays; row r is made of the pieces ``row_offsets[r]`` to ``row_offsets[r + 1]``.

    Attributes:
        seq_length: tokens a row has room for.
        row_offsets: int64 [rows + 1], into the pieces.
        document, start, length: [pieces], the document of a piece, its first token there, its tokens (all > 0).
        statistics: of all of it.
    """

    seq_length: int
    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    statistics: PlanStatistics

    @property
    def rows(self) -> int:
        """Rows in the plan."""
        return len(self.row_offsets) - 1

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Real tokens of each row, int64 [rows]."""
        if not self.rows:
            return np.empty(0, np.int64)
        return np.add.reduceat(self.length, self.row_offsets[:-1], dtype=np.int64)

    @property
    def attention_work(self) -> np.ndarray:
        """``attention_work_of`` every row, float64 [rows]."""
        if not self.rows:
            return np.empty(0)
        return np.add.reduceat(np.square(self.length, dtype=np.float64), self.row_offsets[:-1])

    def tokens_of(self, row: int) -> int:
        """Real tokens of one row."""
        return int(self.length[self._span(row)].sum())

    def attention_work_of(self, row: int) -> int:
        """The sum of the squared lengths of a row's documents: what attention within them costs."""
        return int(np.square(self.length[self._span(row)], dtype=np.int64).sum())

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """``(document, start, length)`` of each piece of a row, in their order."""
        span = self._span(row)
        return list(zip(*(part[span].tolist() for part in (self.document, self.start, self.length)), strict=True))

    def _span(self, row: int) -> slice:
        return slice(self.row_offsets[row], self.row_offsets[row + 1])


def plan_rows(document_lengths: np.ndarray, seq_length: int, method: str = BEST_FIT) -> RowPlan:
    """Packs documents of the given token counts [documents] into rows; every token lands in exactly one row.

    Deterministic: equal lengths give an equal plan. Documents without tokens take no place.
    Raises InputError for an unknown method or a row without room.
    """
    if method not in METHODS:
        raise InputError("data.packing", method, f"give one of {', '.join(METHODS)}")
    if not 1 <= seq_length <= MOST_ROW_TOKENS:
        raise InputError("train.seq_length", seq_length, f"a row has room for 1 to {MOST_ROW_TOKENS:,} tokens")
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
    lengths = _narrow(lengths)  # half the memory, and its pages are what takes time
    long = np.flatnonzero(lengths >= seq_length)
    whole_rows = lengths[long] // seq_length
    rest = lengths.copy()
    rest[long] -= whole_rows * seq_length
    full_document = np.repeat(long, whole_rows)
    full_start = _counted(whole_rows) * seq_length
    items = np.flatnonzero(rest).astype(np.int32)
    items = items[stable_order(seq_length - rest[items])]
    sizes = rest[items]
    rows = spread_small(sizes, best_fit_rows(sizes, seq_length), seq_length, seq_length // TOKENS_A_DOCUMENT)
    in_row_order = stable_order(rows)
    items, sizes = items[in_row_order], sizes[in_row_order]
    ends = np.cumsum(np.bincount(rows), dtype=np.int64)
    full = len(full_document)
    return _plan(
        seq_length,
        row_offsets=np.concatenate([np.arange(full + 1), full + ends]),
        document=_joined(full_document, items),
        start=_joined(full_start, lengths[items] - sizes),
        length=_joined(np.full(full, seq_length), sizes),
    )


def _joined(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    return np.concatenate([first, then], dtype=then.dtype, casting="same_kind")


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one behind the other, int64."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _plan(seq_length: int, row_offsets: np.ndarray, **pieces: np.ndarray) -> RowPlan:
    """A plan with its pieces in the narrowest type that holds them: 12 bytes a piece but for giant corpora."""
    pieces = {name: _narrow(part) for name, part in pieces.items()}
    return RowPlan(seq_length, row_offsets, **pieces, statistics=_statistics(seq_length, row_offsets, **pieces))


def _statistics(
    seq_length: int, row_offsets: np.ndarray, document: np.ndarray, start: np.ndarray, length: np.ndarray
) -> PlanStatistics:
    a_row = np.diff(row_offsets)
    tokens, goes_on = int(length.sum(dtype=np.int64)), document[start > 0]
    return PlanStatistics(
        rows=len(a_row),
        tokens=tokens,
        padding=len(a_row) * seq_length - tokens,
        documents=len(document) - len(goes_on),
        split_documents=_distinct(goes_on),
        documents_a_row=len(document) / max(len(a_row), 1),
        documents_a_row_p99=_percentile(np.bincount(a_row), 0.99),
        most_documents=int(a_row.max(initial=0)),
    )


def _distinct(numbers: np.ndarray) -> int:
    """How many different ones there are, of numbers from 0."""
    there = np.zeros(numbers.max(initial=-1) + 1, bool)
    there[numbers] = True
    return int(np.count_nonzero(there))


def _percentile(counts: np.ndarray, share: float) -> int:
    """The smallest number that so large a share is not above; ``counts[n]`` of them are n."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum()))


def _narrow(part: np.ndarray) -> np.ndarray:
    return part.astype(np.int32 if part.max(initial=0) <= np.iinfo(np.int32).max else np.int64, copy=False)


METHODS: dict[str, Callable[[np.ndarray, int], RowPlan]] = {BEST_FIT: _best_fit, CONCAT: _concat}

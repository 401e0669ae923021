"""The order of training: which row of which source comes next, as a pure function.

The next source is decided by the weights and by the tokens taken so far, the next row of a source by its cursor and a
keyed permutation. Nothing else enters: not the number of ranks, the batch size, the budget of the run or the number
of processes that read. What was drawn is a cursor and a token ledger per source, so a run can be stopped, extended,
and reweighted, without repeating or skipping a row of any source.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cpt_mega.data.order import order_key, permuted
from cpt_mega.data.rows import PAD_ID, PackedRow, build_row
from cpt_mega.data.sources import Source, normalised_weights
from cpt_mega.data.stream_state import StreamState


class RowRef(NamedTuple):
    """A row by its place: which source of the stream, which row of that source's plan."""

    source_index: int
    row: int


class MixedStream:
    """Draws rows from weighted sources.

    Args:
        sources: with distinct names and positive weights.
        seq_length: tokens of a row.
        seed: of the row order.
        state: where to go on; None starts at the beginning. It is copied, not changed. Sources it does not know start
            at 0; what it says of sources that are absent here is kept.
        pad_id: what fills a row that documents do not; masked.

    Raises InputError for sources that make no mixture (see ``normalised_weights``).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_length: int,
        seed: int,
        state: StreamState | None = None,
        pad_id: int = PAD_ID,
    ):
        self.sources, self.seq_length, self.seed, self.pad_id = list(sources), seq_length, seed, pad_id
        self.weights = normalised_weights(self.sources)
        names = [source.name for source in self.sources]
        self._state = (state or StreamState()).under(dict(zip(names, self.weights, strict=True)))
        self._drawn = [self._state.sources[name] for name in names]
        self._total = sum(drawn.tokens_under_weights for drawn in self._drawn)

    @property
    def state(self) -> StreamState:
        """Where the stream stands, as a copy."""
        return self._state.copy()

    def next_batch(self, rows: int) -> list[RowRef]:
        """Draws the next ``rows`` rows. Drawing 3 and then 4 is drawing 7."""
        return [self._draw() for _ in range(rows)]

    def read(self, ref: RowRef) -> PackedRow:
        """The tokens of a row. Raises InputError when they do not fit the model's vocabulary."""
        source = self.sources[ref.source_index]
        return build_row(source.corpus, source.plan, ref.row, self.seq_length, self.pad_id, source.vocab_size)

    def row_tokens(self, ref: RowRef) -> int:
        """Real tokens of a row, padding left out."""
        return self.sources[ref.source_index].plan.tokens_of(ref.row)

    def attention_work(self, ref: RowRef) -> int:
        """Of a row, as the sum of its documents' squared lengths."""
        return self.sources[ref.source_index].plan.attention_work_of(ref.row)

    def _draw(self) -> RowRef:
        index = self._most_urgent()
        ref = RowRef(index, self._row_at(self.sources[index], self._drawn[index].rows_taken))
        tokens = self.row_tokens(ref)
        self._drawn[index].take(tokens)
        self._total += tokens
        return ref

    def _most_urgent(self) -> int:
        """The source that would be the first to lag a whole row behind its share.

        Among the sources that a row would not put more than a row ahead. Simply taking the one that lags most lets
        others fall behind by more than a row once there are many; earliest deadline first keeps every source within
        one row of its share at every point (Baruah et al., Proportionate Progress, Algorithmica 1996).
        """
        row, due = self.seq_length, self._total + self.seq_length
        taken = [drawn.tokens_under_weights for drawn in self._drawn]
        entitled = [index for index, weight in enumerate(self.weights) if weight * due > taken[index]]
        return min(entitled, key=lambda index: (taken[index] + row) / self.weights[index])

    def _row_at(self, source: Source, cursor: int) -> int:
        """Which row of its plan a source gives at a cursor; every epoch has its own order."""
        epoch, index = divmod(cursor, source.plan.rows)
        return permuted(index, source.plan.rows, order_key(self.seed, source.name, epoch))

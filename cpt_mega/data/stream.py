"""The order of training: which row of which source comes next, as a pure function.

The next source is decided by the mixture and by the tokens taken so far, the next row of a source by its cursor and a
keyed permutation. Nothing else enters: not the number of ranks, the batch size, the budget of the run or the number
of processes that read. What was drawn is a cursor and a token ledger per source, so a run can be stopped, extended,
and reweighted, without repeating or skipping a row of any source.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cpt_mega.data.mixture import Mixture
from cpt_mega.data.order import order_key, permuted, unpermuted
from cpt_mega.data.row_checks import MASK, OFF, SKIP, RowChecks, RowHit
from cpt_mega.data.rows import PAD_ID, PackedRow, build_row, counted_tokens
from cpt_mega.data.sources import Source, check_sources, fixed_mixture
from cpt_mega.data.stream_state import SourceState, StreamState
from cpt_mega.errors import InputError

STOP, DROP = "stop", "drop"


class RowRef(NamedTuple):
    """A row by its place: which source of the stream, which row of that source's plan."""

    source_index: int
    row: int


class EndOfData(Exception):
    """A source has given all that it may, and the run is to end then."""


@dataclass(frozen=True)
class Repetition:
    """How often a source may be read.

    Attributes:
        most_epochs: passes over each source, counted since the run began; None for any number.
        then: ``STOP`` ends the run when a source that is due has none left, ``DROP`` goes on without it, the others in
            their own proportions, and ends when none is left.
    """

    most_epochs: float | None = None
    then: str = STOP

    def rows(self, source: Source) -> float:
        """Rows that a source may give."""
        # 1.15 x 100 is a little less than 115
        return float("inf") if self.most_epochs is None else int(self.most_epochs * source.plan.rows + 1e-6)


class MixedStream:
    """Draws rows from sources that are mixed by shares of tokens.

    Args:
        sources: with distinct names.
        seq_length: tokens of a row.
        seed: of the row order.
        state: where to go on; None starts at the beginning. It is copied, not changed. Sources it does not know start
            at 0; what it says of sources that are absent here is kept.
        pad_id: what fills a row that documents do not; masked.
        mixture: of these very sources; None mixes them by their weights.
        repetition: how often sources may be read.
        checks: what is done about odd rows; None: nothing. Whoever draws then reads every row, not only its own.

    Raises InputError for sources that make no mixture (see ``check_sources``).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_length: int,
        seed: int,
        state: StreamState | None = None,
        pad_id: int = PAD_ID,
        mixture: Mixture | None = None,
        repetition: Repetition = Repetition(),
        checks: RowChecks | None = None,
    ):
        check_sources(sources)
        self.sources, self.seq_length, self.seed, self.pad_id = list(sources), seq_length, seed, pad_id
        self.repetition, self.checks = repetition, checks or RowChecks()
        self._hits: list[RowHit] = []
        self._barren = Counter()
        self._index = {source.name: index for index, source in enumerate(self.sources)}
        self._state = (state or StreamState()).under(mixture or fixed_mixture(sources), seq_length)
        self._forget_rows_that_are_not_there()
        self.exclude({})
        self._take_back_dropped()
        self._begin()

    @property
    def state(self) -> StreamState:
        """Where the stream stands, as a copy."""
        return self._state.copy()

    @property
    def tokens(self) -> int:
        """What the ledgers of all sources hold."""
        return self._total

    @property
    def shares(self) -> dict[str, float]:
        """What share of the tokens each source has here."""
        mixture = self._state.in_effect
        return dict(zip(mixture.names, mixture.shares(self._total), strict=True))

    def asked_shares(self, tokens: int) -> dict[str, float]:
        """What share of the tokens the configuration, and what replay was raised by, ask for at a place of the run, of sources
        that have not been read out."""
        mixture = self._asked()
        shares = dict(zip(mixture.names, mixture.shares(tokens), strict=True))
        left = {name: share for name, share in shares.items() if share and name not in self._state.dropped}
        return {name: share / sum(left.values()) for name, share in left.items()}

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been read."""
        return {s.name: self._state.sources[s.name].rows_taken / s.plan.rows for s in self.sources}

    def next_batch(self, rows: int) -> list[RowRef]:
        """Draws the next ``rows`` rows. Drawing 3 and then 4 is drawing 7.

        Raises EndOfData when a source may not be read more often.
        """
        return [self._draw() for _ in range(rows)]

    def check_corpora(self) -> None:
        """Raises FaultError when a file of a corpus is not what was opened any more."""
        for source in self.sources:
            source.corpus.check_unchanged()

    def read(self, ref: RowRef) -> PackedRow:
        """The tokens of a row, without targets where the checks mask it.

        Raises InputError when they do not fit the model's vocabulary.
        """
        source = self.sources[ref.source_index]
        row = build_row(source.corpus, source.plan, ref.row, self.seq_length, self.pad_id, source.vocab_size)
        if self.checks.action == MASK and self._problem(ref, row) is not None:
            return replace(row, labels=np.full_like(row.labels, self.pad_id), loss_mask=np.zeros_like(row.loss_mask))
        return row

    def take_hits(self) -> list[RowHit]:
        """The odd rows that have been drawn, or stepped past, since this was asked last."""
        hits, self._hits = self._hits, []
        return hits

    @property
    def dropped(self) -> tuple[str, ...]:
        """Sources that have given all they may, and that the others go on without."""
        return tuple(self._state.dropped)

    def row_tokens(self, ref: RowRef) -> int:
        """Real tokens of a row, padding left out: what is computed, whether it counts or not."""
        return self.sources[ref.source_index].plan.tokens_of(ref.row)

    def attention_work(self, ref: RowRef) -> int:
        """Of a row, as the sum of its documents' squared lengths."""
        return self.sources[ref.source_index].plan.attention_work_of(ref.row)

    def cursors_of(self, ref: RowRef, first: int, last: int) -> list[int]:
        """The cursors of its source, from ``first`` and below ``last``, at which a row comes."""
        source = self.sources[ref.source_index]
        rows = source.plan.rows
        within = (
            epoch * rows + unpermuted(ref.row, rows, order_key(self.seed, source.name, epoch))
            for epoch in range(first // rows, -(-last // rows))
        )
        return [cursor for cursor in within if first <= cursor < last]

    def go_on_from(self, state: StreamState) -> None:
        """Goes back, or on, to where a state of this very stream stood."""
        self._state = state.copy()
        self._barren.clear()
        self.exclude({})
        self._begin()

    def reweight(self, weights: Mapping[str, float]) -> None:
        """Lets other shares take effect, from the next row on until they are changed again; weights in any unit.

        For decisions during a run, which are part of the state from then on. A configuration that asks for another mixture
        than before takes its place. Sources that have been read out stay out. Raises InputError for names that are not the
        sources', weights that are no shares, and when no source is left.
        """
        if set(weights) != set(self._index):
            odd = sorted(set(weights) ^ set(self._index))[0]
            raise InputError("weights", odd, f"give a weight to each of {', '.join(self._index)}, and to no other")
        left = {name: weight for name, weight in weights.items() if weight != 0 and name not in self._state.dropped}
        self._state.enter(Mixture.fixed(left, "weights"), self.seq_length)
        self._begin()

    def raise_replay(self, share: float) -> None:
        """Lets replay sources together have so much more of the tokens than is configured, at each point of a curriculum, from
        the next row on; not on top of an earlier raise. A configuration that asks for another mixture takes its place."""
        self._state.raised = share
        mixture: Mixture | None = self._asked()
        for name in self._state.dropped:
            if mixture is not None and name in mixture.names:
                mixture = mixture.without(mixture.names.index(name), self._total)
        if mixture is not None:  # or nothing that is asked for is left
            self._state.enter(mixture, self.seq_length)
        self._begin()

    def _asked(self) -> Mixture:
        replay = {source.name for source in self.sources if source.role == "replay"}
        return self._state.configured.raised(replay, self._state.raised)

    def exclude(self, rows: Mapping[str, Iterable[int]]) -> None:
        """Steps past rows from here on, by their number in the plan of a source; no other row moves.

        Raises InputError for a source or a row that is not there, and when nothing is left of a source.
        """
        excluded = dict(self._state.excluded)
        for name, more in rows.items():
            if name not in self._index:
                raise InputError("excluded source", name, f"give one of {', '.join(self._index)}")
            excluded[name] = sorted({*excluded.get(name, []), *map(int, more)})
        for name in excluded.keys() & self._index.keys():
            _check_excluded(name, excluded[name], self.sources[self._index[name]].plan.rows)
        self._state.excluded = excluded
        self._excluded = {name: set(some) for name, some in excluded.items()}

    def _forget_rows_that_are_not_there(self) -> None:
        """Excluded rows are numbers in a plan; under another one, which had to be accepted, some may be none."""
        for name, rows in self._state.excluded.items():
            if name in self._index:
                there = self.sources[self._index[name]].plan.rows
                self._state.excluded[name] = [row for row in rows if row < there]

    def _take_back_dropped(self) -> None:
        """Sources that were read out may be read on when they may be read more often now."""
        back = [
            name
            for name in self._state.dropped
            if self._state.sources[name].rows_taken < self.repetition.rows(self.sources[self._index[name]])
        ]
        if not back:
            return
        mixture, still = self._state.configured, [name for name in self._state.dropped if name not in back]
        for name in still:
            mixture = mixture and mixture.without(mixture.names.index(name), self._state.tokens)
        if mixture is not None:
            self._state.dropped = still
            self._state.enter(mixture, self.seq_length)

    def _begin(self) -> None:
        """Measures from the state on."""
        self._total, self._names = self._state.tokens, self._state.in_effect.names
        self._windows = [self._window(number) for number in range(len(self._names))]

    def _window(self, number: int) -> tuple[float, float]:
        """Between which places of the run the next row of a source of the mixture is due."""
        state, mixture = self._state, self._state.in_effect
        taken = state.sources[mixture.names[number]].tokens_under_mixture
        begin, end = (mixture.deadline(number, state.since, tokens) for tokens in (taken, taken + self.seq_length))
        return begin, end

    def _draw(self) -> RowRef:
        while True:
            number = self._most_urgent()
            index = self._index[self._names[number]]
            source = self.sources[index]
            drawn = self._state.sources[source.name]
            if self._step_past_excluded(source, drawn) >= self.repetition.rows(source):
                self._give_up(number, source)
                continue
            ref = RowRef(index, self._row_at(source, drawn.rows_taken))
            action = self._look_at(ref)
            tokens = 0 if action in (MASK, SKIP) else counted_tokens(source.corpus, source.plan, ref.row)
            self._check_barren(source, tokens)
            drawn.take(tokens)
            if tokens or action == MASK:  # a row of which nothing counts would be computed for nothing
                break
        self._total += tokens
        self._windows[number] = self._window(number)
        return ref

    def _look_at(self, ref: RowRef) -> str | None:
        """What is done about a row; None for one that is not odd."""
        if self.checks.action == OFF:
            return None
        source = self.sources[ref.source_index]
        row = build_row(source.corpus, source.plan, ref.row, self.seq_length, self.pad_id, source.vocab_size)
        problem = self._problem(ref, row)
        if problem is None:
            return None
        documents = [document for document, _, _ in source.plan.pieces(ref.row)]
        self._hits.append(RowHit(source.name, ref.row, documents, problem, self.checks.action))
        return self.checks.action

    def _check_barren(self, source: Source, tokens: int) -> None:
        """A source of which nothing counts would be due for ever, and its run would never end."""
        self._barren[source.name] = 0 if tokens else self._barren[source.name] + 1
        # twice: in two epochs the one row that counts may be the first and the last
        if self._barren[source.name] > 2 * source.plan.rows:
            fix = "nothing of this source counts for the loss: look at its loss mask and at data.row_checks, or leave it out"
            raise InputError(f"rows one behind the other of source {source.name}", self._barren[source.name], fix)

    def _problem(self, ref: RowRef, row: PackedRow) -> str | None:
        return self.checks.problem(row.ids[: self.row_tokens(ref)])

    def _most_urgent(self) -> int:
        """The source of the mixture that would be the first to lag a whole row behind its share.

        Among the sources that a row would not put more than a row ahead. Simply taking the one that lags most lets
        others fall behind by more than a row once there are many; earliest deadline first keeps every source within
        one row of its share at every point (Baruah et al., Proportionate Progress, Algorithmica 1996).
        """
        due = self._total + self.seq_length
        entitled = [number for number, (begin, _) in enumerate(self._windows) if begin < due]
        # rounding may leave none where shares change steeply: then whoever comes first
        return min(entitled or range(len(self._windows)), key=lambda number: self._windows[number][::-1])

    def _step_past_excluded(self, source: Source, drawn: SourceState) -> int:
        """The cursor of the next row that may be drawn."""
        excluded = self._excluded.get(source.name)
        while excluded and self._row_at(source, drawn.rows_taken) in excluded:
            drawn.rows_taken += 1
        return drawn.rows_taken

    def _give_up(self, number: int, source: Source) -> None:
        """A source that is due may not be read on."""
        words = f"source {source.name} has been read {self.repetition.most_epochs:g} times (data.max_epochs)"
        if self.repetition.then == STOP:
            raise EndOfData(words)
        rest = self._state.in_effect.without(number, self._state.tokens)
        if rest is None:
            raise EndOfData(f"{words}, and no other is left")
        self._state.enter(rest, self.seq_length)
        self._state.dropped.append(source.name)
        self._begin()

    def _row_at(self, source: Source, cursor: int) -> int:
        """Which row of its plan a source gives at a cursor; every epoch has its own order."""
        epoch, index = divmod(cursor, source.plan.rows)
        return permuted(index, source.plan.rows, order_key(self.seed, source.name, epoch))


def _check_excluded(name: str, excluded: Sequence[int], rows: int) -> None:
    if excluded and not 0 <= excluded[0] <= excluded[-1] < rows:
        raise InputError(f"excluded row of {name}", excluded[-1], f"its plan has rows 0 to {rows - 1}")
    if len(excluded) == rows:
        raise InputError(f"excluded rows of {name}", f"all {rows}", "nothing is left of it; leave the source out")

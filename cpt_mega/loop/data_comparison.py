"""At which step two runs drew other rows, by their ledgers; corpora are opened only where the ledgers do not say the same."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cpt_mega.checkpoint.comparison import ValueDifference, leaves, value_difference
from cpt_mega.errors import InputError
from cpt_mega.loop.replay import Replay, SeenRow, entry_terms

Progress = Callable[[int, int], None]

BY_LEDGER, BY_ROWS = "ledger", "rows"


@dataclass(frozen=True)
class RowDifference:
    """A place in the batch of a step: the row of each run as JSON (source, row, documents), None where it has none."""

    place: int
    a: dict | None
    b: dict | None


@dataclass(frozen=True)
class DataComparison:
    """The rows of two runs.

    Attributes:
        steps: whose rows were compared, up to the first that differs.
        by: ``BY_ROWS`` where rows were drawn again, ``BY_LEDGER`` where the ledgers' word was enough, or all there was.
        first_step: the first whose rows, or whose entries of the ledger, differ; None when none does.
        rows: of that step, where they differ; empty when they could not be drawn.
        entries: what the ledgers say otherwise about that step.
        not_compared: a sentence each.
    """

    steps: int = 0
    by: str | None = None
    first_step: int | None = None
    rows: list[RowDifference] = field(default_factory=list)
    entries: list[ValueDifference] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)


def compare_data(a: Path, b: Path, progress: Progress = lambda done, total: None) -> DataComparison:
    """Compares which rows each step drew, over the steps that both runs made; ``progress(step, last step)``."""
    try:
        one, other = Replay(a), Replay(b)
    except InputError as error:
        return DataComparison(not_compared=[f"data: {error}"])
    after = max(replay.entries[0]["step"] for replay in (one, other))
    last = min(one.last_step, other.last_step)
    if after >= last:
        return DataComparison(not_compared=["data: no step was made by both runs"])
    if _entries(one, last) == _entries(other, last):
        return DataComparison(last - after, BY_LEDGER)
    try:
        return _compare_rows(one, other, after, last, progress)
    except InputError as error:
        return _compare_entries(one, other, after, last, error)


def _entries(replay: Replay, last: int) -> list[tuple]:
    """What the ledger says of the steps up to one: equal entries are equal rows, as the order is a function of them."""
    return [(entry["step"], entry_terms(entry), entry["state"]) for entry in replay.entries if entry["step"] < last]


def _compare_rows(one: Replay, other: Replay, after: int, last: int, progress: Progress) -> DataComparison:
    """Draws what the ledgers do not already tell to be equal. Raises InputError where a corpus is not there any more."""
    begins = {entry["step"] for replay in (one, other) for entry in replay.entries if after < entry["step"] < last}
    ends = [*sorted(begins), last]
    for begin, end in zip([after, *ends], ends, strict=False):
        if one.order_after(begin) != other.order_after(begin):
            drawn = zip(one.drawn(begin, end), other.drawn(begin, end), strict=True)
            for step, (rows_a, rows_b) in enumerate(drawn, start=begin + 1):
                progress(step, last)
                if rows_a != rows_b:
                    found = _differing_rows(one, other, step)
                    return DataComparison(step - after, BY_ROWS, step, found, _said_otherwise(one, other, step))
        progress(end, last)
    return DataComparison(last - after, BY_ROWS)


def _differing_rows(one: Replay, other: Replay, step: int) -> list[RowDifference]:
    """Where the rows of a step differ; every place, when corpora or rows are cut otherwise."""
    rows_a, rows_b = one.rows_of(step), other.rows_of(step)
    drawn_a, drawn_b = next(one.drawn(step - 1, step)), next(other.drawn(step - 1, step))
    most = max(len(rows_a), len(rows_b))
    return [
        RowDifference(place, _told(rows_a, place), _told(rows_b, place))
        for place in range(most)
        if drawn_a[place : place + 1] != drawn_b[place : place + 1]
    ]


def _told(rows: list[SeenRow], place: int) -> dict | None:
    if place >= len(rows):
        return None
    row = rows[place]
    return {"source": row.source, "row": row.row, "documents": [asdict(piece) for piece in row.pieces]}


def _said_otherwise(one: Replay, other: Replay, step: int) -> list[ValueDifference]:
    """What differs between the entries by which a step was drawn."""
    entries = [replay.entry_after(step - 1) for replay in (one, other)]
    said = [dict(_said(entry, with_state=entries[0]["step"] == entries[1]["step"])) for entry in entries]
    names = [*said[0], *(name for name in said[1] if name not in said[0])]
    found = (value_difference(name, *(values.get(name) for values in said)) for name in names)
    return [difference for difference in found if difference is not None]


def _said(entry: dict, with_state: bool) -> Iterator[tuple[str, object]]:
    terms = entry_terms(entry)
    named = {source["name"]: source["identity"] for source in terms.pop("sources")}
    yield from leaves(named, "corpus")
    for name, value in {**terms, **({"state": entry["state"]} if with_state else {})}.items():
        yield from leaves(value, name)


def _compare_entries(one: Replay, other: Replay, after: int, last: int, error: InputError) -> DataComparison:
    """What can be told when rows cannot be drawn: entries that both have."""
    held = [{step: rest for step, *rest in _entries(replay, last)} for replay in (one, other)]
    notes = [f"rows: they cannot be drawn again ({error}); the entries of the ledgers were compared instead"]
    first = next((s + 1 for s in sorted(held[0].keys() & held[1].keys()) if held[0][s] != held[1][s]), None)
    alone = sorted(held[0].keys() ^ held[1].keys())
    if alone:
        notes.append(f"data: entries of one ledger only, after steps {', '.join(map(str, alone))}")
    entries = [] if first is None else _said_otherwise(one, other, first)
    return DataComparison(last - after, BY_LEDGER, first, entries=entries, not_compared=notes)

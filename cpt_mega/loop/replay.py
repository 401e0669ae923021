"""Which documents a run saw at which step: its order of training drawn again from what its ledger says.

No row is stored for any step. The order is a pure function of the data state, and every place where that was set, the
start of each session and each change of weights, is an entry of the ledger: ``{"kind": "data", ...}``. Between them only the
cursors move, which each line of the metrics has, so that no step is far; where lines are missing it is drawn from the entry.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from cpt_mega.config import Config
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.packing import PACKING_VERSION
from cpt_mega.data.plan_store import open_plan
from cpt_mega.data.row_checks import RowChecks
from cpt_mega.data.rows import PackedRow
from cpt_mega.data.sources import Source, corpus_identity
from cpt_mega.data.stream import EndOfData, MixedStream, Repetition, RowRef
from cpt_mega.data.stream_state import StreamState
from cpt_mega.errors import InputError
from cpt_mega.json_types import Count, Range, type_problem
from cpt_mega.loop.run_folder import LEDGER, METRICS, read_lines, read_status

KIND = "data"
_Size = Annotated[int, Range(1, 2**24)]


class _Source(TypedDict):
    name: str
    role: str
    path: str
    identity: str


class _Entry(TypedDict):
    """What ``data_entry`` makes, without what every line of the ledger has."""

    step: Count
    sources: list[_Source]
    packing: str
    packing_version: int
    seq_length: _Size
    rows: _Size
    seed: int
    max_epochs: float | None
    at_max_epochs: str
    row_checks: RowChecks
    state: dict


class _Line(TypedDict):
    """What is needed of a line of the metrics."""

    step: Count
    tokens_by_source: dict[str, Count]
    epochs_by_source: dict[str, Annotated[float, Range(0, 2**53)]]


def data_entry(config: Config, sources: list[Source], identities: dict[str, str], step: int, state: dict) -> dict:
    """The ledger's line about the data that follow a step.

    Args:
        identities: of the corpora, by source (``corpus_identity``).
        state: JSON of the stream's state there.
    """
    return {
        "kind": KIND,
        "step": step,
        "sources": [
            {"name": s.name, "role": s.role, "path": s.corpus.prefix, "identity": identities[s.name]} for s in sources
        ],
        "packing": config.data.packing,
        "packing_version": PACKING_VERSION,
        "seq_length": config.train.seq_length,
        "rows": config.train.global_batch_size,
        "seed": config.train.seed,
        "max_epochs": config.data.max_epochs,
        "at_max_epochs": config.data.at_max_epochs,
        "row_checks": config.data.row_checks.model_dump(),
        "state": state,
    }


def entry_terms(entry: dict) -> dict:
    """What an entry says of the order of rows, but for where it stands and where the corpora lie."""
    sources = [{"name": spec["name"], "identity": spec["identity"]} for spec in entry["sources"]]
    apart = ("kind", "time_s", "step", "state")
    return {**{name: value for name, value in entry.items() if name not in apart}, "sources": sources}


@dataclass(frozen=True)
class SeenPiece:
    """Some tokens of a document in a row: ``start`` to ``start + length`` of document ``document`` of the corpus."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class SeenRow:
    """A row of a step.

    Attributes:
        source, row: which row of the plan of which source.
        pieces: its documents, in order.
        packed: its tokens, targets and mask as the model got them.
    """

    source: str
    row: int
    pieces: list[SeenPiece]
    packed: PackedRow


@dataclass(frozen=True)
class DrawnRow:
    """A row by what it is: row ``row`` of what a corpus of this identity packs to. ``source`` is what the run calls it."""

    source: str
    identity: str
    packing: str
    seq_length: int
    row: int


class Replay:
    """The data of a run, from its folder.

    Attributes:
        entries: of the ledger, about the data that follow a step, by ascending steps.
        last_step: the last whose numbers are known.

    Raises InputError when the folder is not a run's, a corpus is not the one it was trained on, or code that packs
    otherwise wrote it.
    """

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.entries = _entries(self.run_dir)
        self._lines = _lines(self.run_dir)
        self.last_step = _last_step(self.run_dir, self._lines)
        self._opened: dict[tuple, list[Source]] = {}

    def rows_of(self, step: int) -> list[SeenRow]:
        """The rows of a step (from 1), in the order of the global batch; also of one that comes after the last.

        That is how the step is looked at at which a run came to grief. Raises InputError for a step before the folder's first,
        or behind the end of the data.
        """
        stream, entry = self._stream_after(step - 1)
        return [_seen(stream, ref) for ref in _batch(stream, entry, step)]

    def entry_after(self, step: int) -> dict:
        """The entry of the ledger by which the data after a step were drawn. Raises InputError before the folder's first."""
        entry = next((entry for entry in reversed(self.entries) if entry["step"] <= step), None)
        if entry is None:
            fix = f"this folder's run begins with step {self.entries[0]['step'] + 1}"
            raise InputError("--step", step + 1, fix)
        return entry

    def order_after(self, step: int) -> dict:
        """All that decides which rows follow a step, up to the next entry: where it is equal, so are they."""
        stream, entry = self._stream_after(step)
        return {**entry_terms(entry), "state": stream.state.to_json()}

    def drawn(self, after: int, last: int) -> Iterator[list[DrawnRow]]:
        """The rows of each step after one and up to another, of one entry; no token is read. Raises as ``rows_of``."""
        stream, entry = self._stream_after(after)
        identities = [spec["identity"] for spec in entry["sources"]]
        for step in range(after + 1, last + 1):
            yield [
                DrawnRow(stream.sources[at].name, identities[at], entry["packing"], entry["seq_length"], row)
                for at, row in _batch(stream, entry, step)
            ]

    def when_seen(
        self, source: str, document: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[int, int, SeenPiece]]:
        """``(step, place in the batch, piece)`` of every time that a document was trained on.

        ``progress(steps, of all)`` tells how far it is. Raises InputError for a source or document that is not there.
        """
        ends = [*(entry["step"] for entry in self.entries[1:]), self.last_step]
        names = {spec["name"] for entry in self.entries for spec in entry["sources"]}
        if source not in names:
            fix = f"the run has no such source; its sources are {', '.join(sorted(names))}"
            raise InputError("--document", source, fix)
        for entry, end in zip(self.entries, ends, strict=True):
            stream = self._stream(entry)
            index = next((number for number, one in enumerate(stream.sources) if one.name == source), None)
            if index is None:  # added later, or dropped before
                continue
            rows = _rows_with(stream.sources[index], document)
            for place, last in _stretches(stream, index, rows, self._places(stream, entry, end), end):
                stream.go_on_from(place.state())
                for step, refs in islice(_batches(stream, place.step, entry), last - place.step):
                    progress(step, self.last_step)
                    for position, ref in enumerate(refs):
                        for piece in rows.get(ref.row, ()) if ref.source_index == index else ():
                            yield step, position, piece

    def _stream_after(self, step: int) -> tuple[MixedStream, dict]:
        """A stream that stands where the run's stood after a step, and its entry."""
        entry = self.entry_after(step)
        stream = self._stream(entry)
        place = self._places(stream, entry, step)[-1]
        stream.go_on_from(place.state())
        for between in range(place.step + 1, step + 1):
            _batch(stream, entry, between)
        return stream, entry

    def _places(self, stream: MixedStream, entry: dict, last: int) -> list["_Place"]:
        """Where the stream is known to have stood after an entry and up to a step, in order; the entry itself is the first."""
        first, lines = stream.state, self._lines
        low, high = (bisect_right(lines, step, key=itemgetter("step")) for step in (entry["step"], last))
        known = (_Place(line["step"], stream, first, line) for line in lines[low:high])
        return [_Place(entry["step"], stream, first), *known]

    def _stream(self, entry: dict) -> MixedStream:
        state = StreamState.from_json(entry["state"])
        repetition = Repetition(entry["max_epochs"], entry["at_max_epochs"])
        return MixedStream(
            self._sources(entry),
            entry["seq_length"],
            entry["seed"],
            state,
            mixture=state.configured,
            repetition=repetition,
            checks=RowChecks(**entry["row_checks"]),
        )

    def _sources(self, entry: dict) -> list[Source]:
        if entry["packing_version"] != PACKING_VERSION:
            fix = f"this code packs by version {PACKING_VERSION}; look with the code that the run was made with"
            raise InputError("packing of the run", f"version {entry['packing_version']}", fix)
        key = (json.dumps(entry["sources"]), entry["seq_length"], entry["packing"])
        if key not in self._opened:
            self._opened[key] = [_open(spec, entry) for spec in entry["sources"]]
        return self._opened[key]


@dataclass(frozen=True)
class _Place:
    """Where a stream stood after a step: as ``first`` says, but for the cursors and ledgers that a line of the metrics has."""

    step: int
    stream: MixedStream
    first: StreamState
    line: dict | None = None

    def cursor(self, index: int) -> int:
        """Of a source of the stream."""
        source = self.stream.sources[index]
        if self.line is None:
            return self.first.sources[source.name].rows_taken
        return round(self.line["epochs_by_source"][source.name] * source.plan.rows)

    def state(self) -> StreamState:
        """The whole of it."""
        state = self.first.copy()
        if self.line is not None:
            for index, source in enumerate(self.stream.sources):
                drawn = state.sources[source.name]
                drawn.rows_taken, drawn.tokens = self.cursor(index), self.line["tokens_by_source"][source.name]
        return state


def _stretches(
    stream: MixedStream, index: int, rows: Iterable[int], places: Sequence[_Place], end: int
) -> Iterator[tuple[_Place, int]]:
    """The places, and the steps up to which to draw from each, to see all of some rows of a source up to a step."""
    cursors = [place.cursor(index) for place in places]
    wanted = (stream.cursors_of(RowRef(index, row), cursors[0], cursors[-1]) for row in rows)
    for number in sorted({bisect_right(cursors, cursor) - 1 for cursor in chain.from_iterable(wanted)}):
        yield places[number], places[number + 1].step
    if places[-1].step < end:
        yield places[-1], end


def _entries(run_dir: Path) -> list[dict]:
    """Where the data state was set, by ascending steps: what a later session did again is not the run's any more."""
    path = run_dir / LEDGER
    if not path.is_file():
        raise InputError("--run", str(run_dir), f"holds no {LEDGER}: name the run.dir of a run")
    entries: list[dict] = []
    for entry in read_lines(path):
        if entry.get("kind") == KIND:
            values = {name: value for name, value in entry.items() if name not in ("kind", "time_s")}
            problem = type_problem(values, _Entry)
            if problem is not None:  # without it other rows would be told, and nobody would know
                raise InputError("--run", str(path), f"a line about the data is damaged ({problem}); name another run")
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]] + [entry]
    if not entries:
        raise InputError(
            "--run", str(run_dir), "its ledger says nothing about data: it was an evaluation, or older code's"
        )
    return entries


def _lines(run_dir: Path) -> list[dict]:
    """The lines of the metrics about steps, ascending; those that a session did again have been taken out.

    One that is damaged is left out: the steps behind it are drawn from the one before.
    """
    found: list[dict] = []
    for line in read_lines(run_dir / METRICS):
        needed = {name: line[name] for name in _Line.__annotations__ if name in line}  # of very many lines
        ascends = not found or needed.get("step", 0) > found[-1]["step"]
        if line.get("kind") == "train" and ascends and type_problem(needed, _Line) is None:
            found.append(needed)
    return found


def _last_step(run_dir: Path, lines: list[dict]) -> int:
    """The last step whose numbers are known."""
    return max(line.get("step") or 0 for line in (*lines[-1:], read_status(run_dir) or {}))


def _open(spec: dict, entry: dict) -> Source:
    corpus = IndexedCorpus(spec["path"])
    if corpus_identity(spec["path"]) != spec["identity"]:
        fix = f"is not the corpus that the run was trained on ({spec['identity'][:12]}); bring that one back"
        raise InputError(f"source {spec['name']}", spec["path"], fix)
    return Source(spec["name"], spec["role"], corpus, open_plan(corpus, entry["seq_length"], entry["packing"]), 1.0)


def _batches(stream: MixedStream, step: int, entry: dict) -> Iterator[tuple[int, list[RowRef]]]:
    """The steps after one, and their rows."""
    while True:
        step += 1
        yield step, stream.next_batch(entry["rows"])


def _batch(stream: MixedStream, entry: dict, step: int) -> list[RowRef]:
    """The rows of a step, of a stream that stands before it."""
    try:
        return stream.next_batch(entry["rows"])
    except EndOfData as end:
        raise InputError("--step", step, f"the data end before: {end}") from end


def _seen(stream: MixedStream, ref: RowRef) -> SeenRow:
    source = stream.sources[ref.source_index]
    pieces = [SeenPiece(*piece) for piece in source.plan.pieces(ref.row)]
    return SeenRow(source.name, ref.row, pieces, stream.read(ref))


def _rows_with(source: Source, document: int) -> dict[int, list[SeenPiece]]:
    """The rows of a plan that hold a document, and its pieces there."""
    if not 0 <= document < source.corpus.documents:
        fix = f"the corpus of {source.name} holds documents 0 to {source.corpus.documents - 1}"
        raise InputError("--document", f"{source.name}:{document}", fix)
    plan, rows = source.plan, {}
    for piece in np.flatnonzero(plan.document == document).tolist():
        row = int(np.searchsorted(plan.row_offsets, piece, side="right")) - 1
        found = SeenPiece(document, int(plan.start[piece]), int(plan.length[piece]))
        rows.setdefault(row, []).append(found)
    return rows

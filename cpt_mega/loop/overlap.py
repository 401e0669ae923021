"""Before anything is trained: whether items of the suite and of ``eval.sets`` occur in ``data.sources``.

What was found is kept in ``run.dir/overlap.json``, by the digest of each probe and the identity of each corpus, so that a
start with the same data looks for nothing again.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from cpt_mega.config import Config
from cpt_mega.data.indexed import IndexedCorpus, corpus_files
from cpt_mega.data.sources import Source
from cpt_mega.engine.mesh import Mesh
from cpt_mega.errors import FaultError, InputError
from cpt_mega.gates.asking import Interrupted
from cpt_mega.gates.overlap import Overlap, Span, find_items, spans_of
from cpt_mega.gates.probes.probe import Content
from cpt_mega.json_types import Count, type_problem
from cpt_mega.lineage import read_json, text_digest, write_json
from cpt_mega.loop.inputs import Inputs

FILE = "overlap.json"
KIND = "overlap"  # of a ledger's line
FORMAT = 1  # another one where the same items would be found otherwise
_BEAT_S = 5.0  # between signs of life to processes that wait
_SAY_S = 10.0  # between lines of a long search
_SEARCHING = "searching"


class _Entry(TypedDict):
    """Of a probe, by its digest; ``judged``, ``short`` and ``found`` as Overlap has them."""

    probe: str
    judged: Count
    short: Count
    found: list[str]


class _Corpus(TypedDict):
    """Of a corpus, by its identity: its name in the configuration, its tokens, those that were looked at, and the probes."""

    source: str
    tokens: Count
    looked_at_tokens: Count
    probes: dict[str, _Entry]


class _Known(TypedDict):
    """What ``overlap.json`` holds."""

    format: int
    corpora: dict[str, _Corpus]


@dataclass(frozen=True)
class ProbeOverlap:
    """Of a probe, over all sources.

    Attributes:
        judged, short: as Overlap has them.
        found: ids by source, where there are any.
    """

    judged: int
    short: int
    found: dict[str, list[str]]

    @property
    def items(self) -> list[str]:
        """Ids of those that are in some source."""
        return list(dict.fromkeys(name for names in self.found.values() for name in names))

    @property
    def share(self) -> float:
        """Of the items that were judged."""
        return len(self.items) / max(self.judged, 1)

    def __str__(self) -> str:
        sources = ", ".join(f"{name}: {len(ids)}" for name, ids in self.found.items())
        return f"{len(self.items):,} of {self.judged:,} items are in data.sources ({sources}), e.g. {self.items[0]}"


@dataclass(frozen=True)
class Searched:
    """What all of a search found.

    Attributes:
        looked_at: share of each source's tokens.
        probes: what was found of each.
        not_judged: probes whose items are not looked for.
    """

    looked_at: dict[str, float]
    probes: dict[str, ProbeOverlap]
    not_judged: tuple[str, ...]

    def line(self) -> dict:
        """For the ledger; ids are in ``overlap.json``."""
        probes = {
            name: {
                "judged": one.judged,
                "short": one.short,
                "found": len(one.items),
                "sources": {source: len(ids) for source, ids in one.found.items()},
            }
            for name, one in self.probes.items()
        }
        return {"kind": KIND, "looked_at": self.looked_at, "probes": probes, "not_judged": list(self.not_judged)}

    def check(self, most: float, of_suite: Collection[str]) -> None:
        """Raises InputError for the first probe of which more than a share is found; ``of_suite``: names of the suite's."""
        above = [name for name, one in self.probes.items() if one.share > most]
        if not above:
            return
        name, more = above[0], f" ({len(above) - 1} more: {', '.join(above[1:])})" if above[1:] else ""
        fix = (
            f"{self.probes[name]}; their scores would tell what was learnt by heart{more}. Take the texts out of the corpus, "
            f"or the items out of the probe ({FILE} in run.dir names all), or raise gates.max_overlap ({most:g}; null: any)"
        )
        raise InputError("gates.suite" if name in of_suite else "eval.sets", name, fix)


def check_overlap(
    config: Config, inputs: Inputs, mesh: Mesh, folder: Path, console: Console, stops: Callable[[], bool]
) -> dict | None:
    """``search_overlap`` on the main process alone, while the others wait; what was found is kept in the run folder.

    Args:
        stops: asked on the main process, whether to give up because the run is to end: the next start looks again.

    A collective. Returns the same on all ranks, None also where it was given up, and raises the same on all ranks.
    """
    if not mesh.is_main:
        while (answer := mesh.share(None)) == _SEARCHING:
            pass
    else:
        try:
            answer = search_overlap(config, inputs, folder, console, True, lambda: mesh.share(_SEARCHING), stops)
        except Interrupted:
            answer = None
        except (InputError, FaultError) as error:
            answer = error
        except Exception as error:  # the others wait for an answer
            answer = FaultError(f"items could not be looked for in the data: {error!r}")
        mesh.share(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


def search_overlap(
    config: Config,
    inputs: Inputs,
    folder: Path,
    console: Console,
    keeps: bool = False,
    beat: Callable[[], object] = lambda: None,
    stops: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Looks for the items of all probes in all sources, as far as the run folder does not say what is found.

    Args:
        keeps: whether what was found is written into the folder.
        beat: called every few seconds.

    Returns the ledger's line; None where there is nothing to look for. Raises InputError for a probe of which more than
    ``gates.max_overlap`` is found, FaultError for files that cannot be read or written, Interrupted when ``stops`` says so.
    """
    most = config.gates.max_overlap
    if most is None or not config.train.tokens or not inputs.sources or not inputs.suite.probes:
        return None
    telling = _Telling(console, beat, stops)
    found = _searched(inputs, folder / FILE, keeps, telling)
    _say(console, found, telling.seconds)
    found.check(most, inputs.lineage["suite"])
    return found.line()


class _Telling:
    """Lets other processes know that this one lives, and the user how far it is."""

    def __init__(self, console: Console, beat: Callable[[], object], stops: Callable[[], bool]):
        self._console, self._beat, self._stops = console, beat, stops
        self._begun = self._beaten = self._said = time.monotonic()
        self.total_tokens = self._done = 0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def __call__(self, tokens: int) -> None:
        """So many more were looked at. Raises Interrupted."""
        if self._stops():
            raise Interrupted
        self._done += tokens
        now = time.monotonic()
        if now - self._beaten > _BEAT_S:
            self._beaten = now
            self._beat()
        if now - self._said > _SAY_S:
            self._said = now
            rate, left = self._done / self.seconds, self.total_tokens - self._done
            words = (
                f"{self._done / self.total_tokens:.0%}, {rate / 1e6:,.0f} million tokens/s, left {left / rate:,.0f} s"
            )
            self._console.print(f" looking for items of evaluations in data.sources: {words}", style="dim")


@dataclass
class _Task:
    """A source, what is known of it, what of it is looked at, and the contents of the probes that are looked for."""

    source: Source
    known: _Corpus
    spans: list[Span]
    missing: dict[str, list[Content]]

    @property
    def tokens(self) -> int:
        """That are looked at."""
        return sum(span.tokens for span in self.spans)


def _searched(inputs: Inputs, file: Path, keeps: bool, telling: _Telling) -> Searched:
    digests, known = inputs.suite.digests, _read(file)
    places = [_place(source.corpus, inputs.lineage["corpora"][source.name]) for source in inputs.sources]
    known_of = [set(known[place]["probes"]) if place in known else set() for place in places]
    everywhere = set.intersection(*known_of)  # what is known of all need not be tokenised
    contents = {p.name: () if digests[p.name] in everywhere else p.contents() for p in inputs.suite.probes}
    judged = {name: own for name, own in contents.items() if own is not None}
    tasks = [_task(known, *at, judged, digests) for at in zip(inputs.sources, places, strict=True)]
    telling.total_tokens = sum(task.tokens for task in tasks if task.missing)
    for task in tasks:
        if task.missing:
            overlaps = find_items(task.missing, task.source.corpus, task.spans, advance=telling)
            task.known["probes"] |= {digests[name]: _entry(name, one) for name, one in overlaps.items()}
            if keeps:
                _write(file, known)
    entries = {task.source.name: task.known["probes"] for task in tasks}
    return Searched(
        {task.source.name: task.tokens / task.source.corpus.tokens for task in tasks},
        {name: _together({source: own[digests[name]] for source, own in entries.items()}) for name in judged},
        tuple(name for name, own in contents.items() if own is None),
    )


def _task(
    known: dict[str, _Corpus],
    source: Source,
    place: str,
    judged: Mapping[str, list[Content]],
    digests: Mapping[str, str],
) -> _Task:
    spans = spans_of(source.corpus)
    looked_at, before = sum(span.tokens for span in spans), known.get(place, {"probes": {}})
    known[place] = _Corpus(
        source=source.name, tokens=source.corpus.tokens, looked_at_tokens=looked_at, probes=before["probes"]
    )
    missing = {name: own for name, own in judged.items() if digests[name] not in before["probes"]}
    return _Task(source, known[place], spans, missing)


def _entry(name: str, overlap: Overlap) -> _Entry:
    return _Entry(probe=name, **{**asdict(overlap), "found": list(overlap.found)})


def _together(entries: Mapping[str, _Entry]) -> ProbeOverlap:
    """By source."""
    one = next(iter(entries.values()))
    return ProbeOverlap(
        one["judged"], one["short"], {source: entry["found"] for source, entry in entries.items() if entry["found"]}
    )


def _place(corpus: IndexedCorpus, identity: str) -> str:
    """What a corpus is known by: also by when it was written to, for only a manifest vouches for tokens."""
    files = [corpus_files(shard.prefix)[0].stat() for shard in corpus.shards]
    return text_digest(f"{identity} {[(file.st_size, file.st_mtime_ns) for file in files]}")


def _read(path: Path) -> dict[str, _Corpus]:
    """What is known; nothing where the file is not there, damaged or of another version: it can be made again."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value["corpora"] if type_problem(value, _Known) is None and value["format"] == FORMAT else {}


def _write(path: Path, known: dict[str, _Corpus]) -> None:
    try:
        write_json(path, _Known(format=FORMAT, corpora=known))
    except OSError as error:
        raise FaultError(
            f"{path} cannot be written ({error.strerror}): mend that, then the same command goes on"
        ) from None


def _say(console: Console, found: Searched, seconds: float) -> None:
    for name, one in found.probes.items():
        if one.found:
            console.print(f" overlap: {name}: {one}", style="yellow")
    count = Counter()
    for one in found.probes.values():
        count.update(judged=one.judged, short=one.short, items=len(one.items))
    parts = [f"{name} {share:.1%}" for name, share in found.looked_at.items() if share < 1]
    words = [
        f" overlap: {count['items']:,} of {count['judged']:,} items of evaluations are in data.sources",
        *([f"{count['short']:,} too short to tell"] if count["short"] else []),
        *([f"not judged: {', '.join(found.not_judged)}"] if found.not_judged else []),
        *([f"looked at in part: {', '.join(parts)}"] if parts else []),
        f"{seconds:.1f} s",
    ]
    console.print(" | ".join(words), style="dim")

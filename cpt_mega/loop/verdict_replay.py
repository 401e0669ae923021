"""Takes the decisions of a run's gates again, from what it wrote down: the scores of items, the rules, what was known before.

A verdict is a pure function of these (``gates/rules.py``), so what comes out must be what the ledger says, number for number.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from cpt_mega.checkpoint.trainer_state import TrainerState, has_state, read_state
from cpt_mega.errors import InputError
from cpt_mega.gates.probes.perplexity import perplexities
from cpt_mega.gates.rule_functions import function_digest, seen
from cpt_mega.gates.rules import Judge
from cpt_mega.gates.verdict import LookScores, Verdict, outcome
from cpt_mega.json_types import finite_values
from cpt_mega.lineage import parse_json
from cpt_mega.loop.run_folder import ITEMS, LEDGER, read_lines


@dataclass(frozen=True)
class TakenAgain:
    """A decision, and how it comes out now.

    Attributes:
        line: that of the ledger.
        action: now; where a function of the user's own cannot be asked any more, that of the other rules.
        difference: the first thing that is not the same, or why a function cannot be asked, as a sentence; None where all is.
    """

    line: dict
    action: str
    difference: str | None


def known_at_start(state: TrainerState) -> dict:
    """What gates know when a run starts, for its line in the ledger.

    Only the start knows it: what was measured on items that have been changed since is dropped there, and what was done behind
    the checkpoint is undone.

    Keys: ``baseline`` by bucket, and ``baseline_tokens``, where it was taken; ``item_baselines``, the digests of probes whose
    step-0 scores there are; ``looks``, as rules see them.
    """
    looks = [seen(look) for look in state.gate_history]
    return {
        "baseline": finite_values(state.baseline),
        "baseline_tokens": state.baseline_tokens,
        "item_baselines": sorted(state.item_baseline),
        "looks": [look | {"perplexity": finite_values(look["perplexity"])} for look in looks],
    }


def take_again(run_dir: Path) -> list[TakenAgain]:
    """All decisions of gates in a run's ledger, in order.

    Raises InputError for a folder that has no such ledger, one whose lines do not say what was decided on, and one whose run
    took step-0 scores over from a checkpoint that is gone.
    """
    lines = read_lines(run_dir / LEDGER)
    if not any(line.get("kind") == "verdict" for line in lines):
        raise InputError(
            "RUN", str(run_dir), f"has no {LEDGER} with a verdict; name a run folder whose gates have looked"
        )
    known = _Known(run_dir)
    try:
        return [found for line in lines if (found := known.read(line)) is not None]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        fix = f"does not say what its verdicts were taken on ({error!r}); was it written by an older version?"
        raise InputError("RUN", str(run_dir / LEDGER), fix) from error


@dataclass
class _Known:
    """What stands in the ledger up to a line."""

    run_dir: Path
    judge: Judge | None = None
    digests: dict[str, str] = field(default_factory=dict)
    buckets: dict[str, str] = field(default_factory=dict)  # of the probes of perplexity
    function_files: dict[str, str | None] = field(default_factory=dict)  # digests of those that the user's rules are in
    baseline: dict[str, float] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)  # tokens at which a bucket's was taken
    items: dict[str, dict[str, float]] = field(default_factory=dict)  # at step 0, by digest
    history: list[dict] = field(default_factory=list)

    def read(self, line: dict) -> TakenAgain | None:
        take = {"restore": self._start, "baseline": self._take_baseline, "gates": self._take_rules}
        if line.get("kind") == "verdict":
            return self._verdict(line)
        take.get(line.get("kind"), lambda line: None)(line)
        return None

    def _start(self, line: dict) -> None:
        """A run knows what its checkpoint did, less what its line says was dropped; scores of items are not in that line."""
        known = line["known"]
        self.baseline, self.since = _perplexities(known["baseline"]), dict(known["baseline_tokens"])
        self.history = [look | {"perplexity": _perplexities(look["perplexity"])} for look in known["looks"]]
        if not self.items.keys() >= set(known["item_baselines"]):
            self.items = _items_of(Path(line["from"])) | self.items
        self.items = {digest: self.items[digest] for digest in known["item_baselines"]}

    def _take_rules(self, line: dict) -> None:
        self.judge = Judge.from_json({each.name: line[each.name] for each in fields(Judge)})
        self.digests, self.buckets = line["digests"], line["perplexity_probes"]
        self.function_files = line.get("function_files", {})

    def _take_baseline(self, line: dict) -> None:
        self.baseline = {**self.baseline, **_perplexities(line["perplexity"])}
        self.since = {**self.since, **dict.fromkeys(line["perplexity"], line["tokens"])}
        new = set(line["digests"].values()) - self.items.keys()  # what a probe has of step 0 stays
        self.items |= {digest: {} for digest in new}
        for item in self._look(line["items"]):
            if item["digest"] in new and item["score"] is not None:
                self.items[item["digest"]][item["id"]] = item["score"]

    def _verdict(self, line: dict) -> TakenAgain:
        lines, step = list(self._look(line["items"])), line["step"]
        now: dict[str, dict[str, float]] = {}
        for item in lines:
            now.setdefault(item["probe"], {})[item["id"]] = _number(item["score"])
        counted = [item for item in lines if item["probe"] in self.buckets]
        values = perplexities((item["bucket"], _numbers(item["values"])) for item in counted)
        before = {probe: self.items.get(digest, {}) for probe, digest in self.digests.items()}
        scores = LookScores(step, line["tokens"], self.baseline, values, before, now, self.since)
        earlier = [look for look in self.history if look["step"] != step]
        look = {"step": step, "tokens": line["tokens"], "perplexity": values}
        try:
            verdicts = self.judge.verdicts(scores, earlier)
        except InputError as error:  # of a function; the looks to come go by what it said then
            then = [Verdict(**verdict) for verdict in line["verdicts"]]
            self.history = [*earlier, look | outcome(then)]
            rest = replace(self.judge, functions=()).verdicts(scores, earlier)
            return TakenAgain(line, outcome(rest)["action"], str(error))
        self.history = [*earlier, look | outcome(verdicts)]
        action = self.history[-1]["action"]
        again = {
            "perplexity": finite_values(values),
            "action": action,
            "verdicts": [verdict.to_json() for verdict in verdicts],
        }
        again = json.loads(json.dumps(again))
        difference = _difference({name: line[name] for name in again}, again)
        if difference is not None and not difference.startswith("perplexity"):
            difference += self._of_changed_rules()
        return TakenAgain(line, action, difference)

    def _of_changed_rules(self) -> str:
        """What may be behind a difference: the first rule of the user's whose code is another now."""
        changed = (name for name, digest in self.function_files.items() if function_digest(name) != digest)
        return next((f"; the file of {name} is not what it was then" for name in changed), "")

    def _look(self, span: list[int]) -> Iterator[dict]:
        """The lines of items that a look wrote."""
        with open(self.run_dir / ITEMS, "rb") as stream:
            stream.seek(span[0])
            for line in stream.read(span[1] - span[0]).splitlines():
                yield parse_json(line)


def _items_of(folder: Path) -> dict[str, dict[str, float]]:
    """Step-0 scores that a run took over from another one's checkpoint."""
    if not has_state(folder):
        fix = (
            "is the checkpoint that the run began from, and has the step-0 scores that it was judged by; bring it back"
        )
        raise InputError("RUN", str(folder), fix)
    return dict(read_state(folder).item_baseline)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}


def _perplexities(values: Mapping[str, float | None]) -> dict[str, float]:
    """One that is no finite number is infinite, as ``perplexity_of`` has it."""
    return {name: math.inf if value is None else value for name, value in values.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _difference(said: object, now: object, name: str = "") -> str | None:
    """The first place where two plain values differ."""
    if isinstance(said, Mapping) and isinstance(now, Mapping) and said.keys() == now.keys():
        pairs = [(f"{name}.{key}" if name else key, said[key], now[key]) for key in now]
    elif isinstance(said, list) and isinstance(now, list) and len(said) == len(now):
        pairs = [(f"{name}[{at}]", *both) for at, both in enumerate(zip(said, now, strict=True))]
    else:
        return None if said == now else f"{name} is {now!r}, and the ledger says {said!r}"
    return next((found for key, *both in pairs if (found := _difference(*both, key)) is not None), None)

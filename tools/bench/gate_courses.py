"""The course of a run as its gates saw it, from what it wrote down: what ``gate_scenarios.py`` judges and draws."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from cpt_mega.gates.verdict import HARD, NONE, SOFT
from cpt_mega.loop.run_folder import ITEMS, LEDGER, read_lines, read_status


@dataclass(frozen=True)
class Look:
    """A look and what came of it.

    Attributes:
        perplexity: by bucket.
        accuracy: of the items of the gate ``general``, as a share; NaN where there is none.
        levels: of the rules that had something to say.
        reasons: what the rules behind the action said.
        back_to: tokens of the checkpoint that the run went back to from here; None where it went on.
    """

    step: int
    tokens: int
    perplexity: dict[str, float]
    accuracy: float
    action: str
    levels: dict[str, str]
    reasons: tuple[str, ...] = ()
    back_to: int | None = None


@dataclass(frozen=True)
class Course:
    """All looks of a run in the order in which they were taken, the one of step 0 first.

    Attributes:
        state, exit_code, reason: of the end, as ``status.json`` has them.
        lr_scale: what rollbacks left of the schedule's rate.
        raised_replay: share of tokens that rollbacks added to replay.
        perplexity_limit, items_threshold: of the gates of general perplexity and items, as shares; None where none judges.
        gain_limit: where domain perplexity has to be below, as a change since step 0; None where nothing asks for it.
        budget_tokens: of the run; 0 where it is not written down.
        look_s, wall_s: seconds that looks took, and from the first line of the ledger to the last, starts left out.
    """

    looks: tuple[Look, ...]
    state: str
    exit_code: int | None
    reason: str
    lr_scale: float
    raised_replay: float
    perplexity_limit: float | None
    items_threshold: float | None
    gain_limit: float | None
    budget_tokens: int
    look_s: float
    wall_s: float

    def change(self, bucket: str, look: Look | None = None) -> float:
        """Of a bucket's perplexity since step 0, as a share, at a look; at the last one where none is given."""
        return (look or self.looks[-1]).perplexity[bucket] / self.looks[0].perplexity[bucket] - 1

    def accuracy_change(self) -> float:
        return self.looks[-1].accuracy - self.looks[0].accuracy

    @property
    def rollbacks(self) -> list[Look]:
        return [look for look in self.looks if look.back_to is not None]

    def ever(self, level: str) -> list[str]:
        """``rule (looks)`` of all that had this to say at any look."""
        said = [rule for look in self.looks for rule, found in look.levels.items() if found == level]
        return [f"{rule} ({said.count(rule)})" for rule in sorted(set(said))]

    @property
    def hard(self) -> list[str]:
        return self.ever(HARD)

    @property
    def soft(self) -> list[str]:
        return self.ever(SOFT)


def read_course(run: Path) -> Course:
    """Raises OSError, KeyError or ValueError for a folder that is no ended run with a suite."""
    lines, status = read_lines(run / LEDGER), read_status(run)
    if status is None or not any(line["kind"] == "verdict" for line in lines):
        raise ValueError(f"{run} holds no ended run with verdicts")
    gates = [line for line in lines if line["kind"] == "gates"][-1]
    looks, gain = tuple(_looks(run, lines)), gates["gain"]
    rolled = [line for line in lines if line["kind"] == "rollback"]
    last = rolled[-1] if rolled else {}
    return Course(
        looks=looks,
        state=status["state"],
        exit_code=status["exit_code"],
        reason=status["reason"],
        lr_scale=last.get("steering", {}).get("lr_scale", 1.0),
        raised_replay=last.get("raised_replay", 0.0),
        perplexity_limit=gates["perplexity_limit"],
        items_threshold=next((gate["threshold"] for gate in _general(gates) if not gate["disarmed"]), None),
        gain_limit=None if gain is None else looks[0].perplexity["domain"] ** -gain["threshold"] - 1,
        budget_tokens=gain["budget_tokens"] if gain else 0,
        look_s=sum(line.get("look_s", 0.0) for line in lines),
        wall_s=_seconds(lines),
    )


def _looks(run: Path, lines: list[dict]) -> list[Look]:
    """In the order of the ledger; a run that was stopped by a gate and started again is judged twice, and told of once."""
    rules = [line for line in lines if line["kind"] == "gates"]
    gated = {probe for line in rules for gate in _general(line) for probe in gate["probes"]}
    looks: list[Look] = []
    for line in lines:
        if line["kind"] == "baseline":
            looks.append(Look(line["step"], line["tokens"], line["perplexity"], _accuracy(run, line, gated), NONE, {}))
        elif line["kind"] == "verdict":
            if looks[-1].step == line["step"] > 0 and looks[-1].back_to is None:
                looks.pop()
            looks.append(_judged(line, _accuracy(run, line, gated)))
        elif line["kind"] == "rollback" and looks[-1].step == line["step"]:
            target = next(look.tokens for look in looks if look.step == line["to_step"])
            looks[-1] = Look(**{**vars(looks[-1]), "back_to": target})
    return looks


def _judged(line: dict, accuracy: float) -> Look:
    found = line["verdicts"]
    levels = {verdict["rule"]: verdict["level"] for verdict in found if verdict["level"] != NONE}
    reasons = tuple(verdict["reason"] for verdict in found if verdict["action"] == line["action"] and levels)
    values = {bucket: math.nan if value is None else value for bucket, value in line["perplexity"].items()}
    return Look(line["step"], line["tokens"], values, accuracy, line["action"], levels, reasons)


def _general(line: dict) -> list[dict]:
    """The gate of general items, or none."""
    return [gate for gate in line["item_gates"] if gate["name"] == "general"]


def _accuracy(run: Path, line: dict, probes: set[str]) -> float:
    start, end = line["items"]
    with open(run / ITEMS, "rb") as stream:
        stream.seek(start)
        items = [json.loads(text) for text in stream.read(end - start).splitlines()]
    scores = [item["score"] or 0.0 for item in items if item["probe"] in probes]
    return fmean(scores) if scores else math.nan


def _seconds(lines: list[dict]) -> float:
    """Between lines of the ledger, without what lies before a start of the run: nothing ran then, or it was starting."""
    return sum(now["time_s"] - before["time_s"] for before, now in pairwise(lines) if now["kind"] != "restore")

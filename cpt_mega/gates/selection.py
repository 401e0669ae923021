"""Which checkpoint of a run to take, from what was found at each look.

First the Pareto frontier over the buckets that are measured: a checkpoint is dominated when another is at least as good in each
and better in one. By plain values: with bounds around them hardly any would be dominated, and which are would depend on the
number of items. Then the largest

    J = w_domain * gain - w_general * regression - w_behaviour * regression - w_safety * regression

on the frontier, with the changes of ``changes.py``: the gain counts with its sign, a regression is a drop below step 0, and a
rise above it none. Of equals the earlier one. No weight is below zero, so the largest J of all lies on the frontier or is
shared by one that does; the frontier decides where weights are zero or nothing has dropped, and shows what no choice of
weights would bring back. What a gate objected to is no candidate, nor a model that is lost, nor what was measured on other
items than the last look.

Intervals are those of other items of the same kind, not of another run. Those of two checkpoints say little about their
difference, as both are of the same items: ``paired_difference`` resamples these.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from cpt_mega.gates.changes import Estimate, Measure, resampled_changes, total
from cpt_mega.gates.rules import FLAT
from cpt_mega.gates.suite_schema import Bucket
from cpt_mega.gates.verdict import CONTINUE, HARD, NOT_JUDGED, ROLL_BACK, STOP

BUCKETS = get_args(Bucket)
OBJECTIONS = (STOP, ROLL_BACK)  # actions of a gate
_RESAMPLES, _CONFIDENCE = 1_000, 0.95


@dataclass(frozen=True)
class Candidate:
    """A look, and the checkpoint of its step.

    Attributes:
        changes: since step 0, by bucket.
        j: of these; None where they are not known, or not finite.
        objection: why it cannot be chosen; empty where it can.
        dominated_by: a step on the frontier; None for one that is there itself, and for one that cannot be chosen.
    """

    step: int
    tokens: int
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    j: Estimate | None = None
    objection: str = ""
    dominated_by: int | None = None

    @property
    def on_frontier(self) -> bool:
        return not self.objection and self.dominated_by is None

    def to_json(self) -> dict:
        """Plain values."""
        changes = {bucket: change.to_json() for bucket, change in self.changes.items()}
        j = None if self.j is None else self.j.to_json()
        place = {"step": self.step, "tokens": self.tokens, "changes": changes, "j": j}
        why = {"on_frontier": self.on_frontier, "dominated_by": self.dominated_by, "objection": self.objection}
        return place | why


@dataclass(frozen=True)
class Choice:
    """What was chosen among which.

    Attributes:
        buckets: that were measured at the last look.
        weights: of each bucket.
        candidates: by step.
        chosen: None where none can be.
        next_best: the largest J of the others that could be chosen, on the frontier or not.
    """

    buckets: tuple[str, ...]
    weights: Mapping[str, float]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    next_best: Candidate | None

    @property
    def step(self) -> int | None:
        """Of what was chosen."""
        return None if self.chosen is None else self.chosen.step


def healthy_steps(history: Sequence[dict]) -> list[int]:
    """Steps at which the gates judged and did not object, oldest first."""
    return [look["step"] for look in history if look["action"] != NOT_JUDGED and not _found_harm(look)]


def objected_steps(history: Sequence[dict]) -> set[int]:
    """Steps at which a gate found harm, whatever was done about it: patience and ``action: warn`` do not make it good."""
    return {look["step"] for look in history if _found_harm(look)}


def _found_harm(look: Mapping) -> bool:
    hard = {rule for rule, level in look.get("objections", {}).items() if level == HARD}
    return bool(hard - FLAT) or (look["action"] in OBJECTIONS and not hard)


def passed_steps(history: Sequence[dict]) -> list[int]:
    """Steps at which the gates judged and had nothing to say, not even a warning, oldest first: what a gate goes back to.

    Nor had any a doubt: harm that is confirmed at one look was there before, in part, at the looks that could not confirm it.
    """
    return [look["step"] for look in history if look["action"] == CONTINUE and not look.get("doubtful")]


def steps_to_keep(history: Sequence[dict], there: Collection[int], start: int) -> set[int]:
    """Steps whose checkpoints stay whatever their kind: the newest healthy one, the best, and what a gate would go back to.

    Args:
        there: steps that have a checkpoint.
        start: the step that the run began from, which is gone back to as long as no look was passed.
    """
    healthy = [step for step in healthy_steps(history) if step in there]
    passed = [step for step in passed_steps(history) if step in there]
    best = choose(history, there).step
    return {*healthy[-1:], *(passed[-1:] or [start]), *([] if best is None else [best])}


def choose(history: Sequence[dict], among: Collection[int], weights: Mapping[str, float] | None = None) -> Choice:
    """Chooses one of a run's checkpoints; see the top of this module.

    Args:
        history: looks as ``checkpoint.trainer_state.Look`` has them, in any order; of several at one step the last.
        among: steps that can be chosen.
        weights: by bucket, in place of those that the last look has.
    """
    looks = {look["step"]: look for look in history}
    known = {step: look["scores"] for step, look in looks.items() if look.get("scores")}
    newest = looks[max(known)] if known else {}
    last = newest.get("scores", {})
    buckets = tuple(bucket for bucket in BUCKETS if bucket in last)
    measured_on = {bucket: last[bucket]["of"] for bucket in buckets}
    weights = dict.fromkeys(BUCKETS, 1.0) | newest.get("weights", {}) | dict(weights or {})
    candidates = [_candidate(looks[step], measured_on, weights) for step in sorted(looks.keys() & set(among))]
    candidates = _with_frontier(candidates, buckets)
    chosen = max((one for one in candidates if one.on_frontier), key=_rank, default=None)
    others = [one for one in candidates if not one.objection and one is not chosen]
    return Choice(buckets, weights, tuple(candidates), chosen, max(others, key=_rank, default=None))


def explained(choice: Choice, difference: Estimate | None = None) -> list[str]:
    """Why it was chosen, and how far it is from the next best: two sentences.

    Args:
        choice: with one that was chosen.
        difference: see ``paired_difference``; without it only the intervals since step 0 can be told.
    """
    chosen, rest = choice.chosen, choice.next_best
    could = [one for one in choice.candidates if not one.objection]
    number = sum(one.on_frontier for one in could)
    buckets = ", ".join(choice.buckets)
    if number == 1:
        why = f"Step {chosen.step} is at least as good as each of the {len(could)} that can be chosen in {buckets}"
    else:
        why = f"Step {chosen.step} has the largest J of the {number} on the frontier of {buckets}"
        why += f", of {len(could)} that can be chosen"
        why += ", as the earliest of equals" if rest.on_frontier and rest.j.value == chosen.j.value else ""
    first = f"{why}: J is {words_of(chosen.j)}{', and below 0 the base is better' if chosen.j.value < 0 else ''}."
    if rest is None:
        return [first, "No other checkpoint can be chosen."]
    second = f"Next is step {rest.step} with {words_of(rest.j)}"
    if difference is not None:
        apart = difference.low > 0
        told = f"on the same items the difference is {words_of(difference)}, " + ("beyond" if apart else "within")
        return [first, f"{second}; {told} what other items could give."]
    apart = rest.j.high < chosen.j.low
    return [first, f"{second}; {'their intervals are apart' if apart else 'their intervals overlap'}."]


def words_of(estimate: Estimate) -> str:
    """The number with its interval."""
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def checkpoint_score(changes: Mapping[str, Estimate], weights: Mapping[str, float]) -> Estimate:
    """J, with the interval that those of the changes give."""
    return total(_part(bucket, change).times(weights[bucket]) for bucket, change in changes.items())


def paired_difference(
    a: Mapping[str, Sequence[Measure]],
    b: Mapping[str, Sequence[Measure]],
    weights: Mapping[str, float],
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """J of ``a`` minus J of ``b``, measured on the same items in the same order, by bucket.

    The interval is a percentile bootstrap over items (Efron and Tibshirani 1993, 13.3), each drawn for both. The same seed
    gives the same numbers. Of a measure with a single item nothing is known, so the interval has no end then.
    """
    rng, drawn = np.random.default_rng(seed), [np.zeros(resamples), np.zeros(resamples)]
    buckets = [bucket for bucket in a if weights[bucket]]
    for bucket in buckets:
        for values, changes in zip(drawn, resampled_changes(a[bucket], b[bucket], resamples, rng), strict=True):
            values += weights[bucket] * _counted(bucket, changes)
    value = sum(weights[bucket] * (_now(bucket, a[bucket]) - _now(bucket, b[bucket])) for bucket in buckets)
    if any(len(measure.now) == 1 for bucket in buckets for measure in a[bucket]):
        return Estimate(value, -math.inf, math.inf)
    outside = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(drawn[0] - drawn[1], (outside, 1 - outside))
    return Estimate(value, float(low), float(high))


def _candidate(look: dict, measured_on: Mapping[str, dict], weights: Mapping[str, float]) -> Candidate:
    scores, place = look.get("scores") or {}, (look["step"], look["tokens"])
    changes = {bucket: _estimate(scores[bucket]) for bucket in BUCKETS if bucket in scores}
    if _found_harm(look):
        objection = f"a gate found harm ({look['action']})"
    elif not scores:
        objection = "no items were compared with step 0"
    elif {bucket: scores[bucket]["of"] for bucket in changes} != measured_on:
        objection = "measured on other items than the last look"
    else:
        objection = ""
    j = checkpoint_score(changes, weights) if changes else None
    known = [change.value for change in changes.values()] + ([] if j is None else [j.value])
    if not all(map(math.isfinite, known)):  # also of a bucket without weight: the model is lost
        j, objection = None, objection or "scores that are no numbers"
    return Candidate(*place, changes, j, objection)


def _estimate(score: Mapping) -> Estimate:
    """Of a look's score, in which None stands for what JSON cannot hold."""
    if score["gain"] is None:
        return Estimate(math.nan, math.nan, math.nan)
    low, high = score["low"], score["high"]
    return Estimate(score["gain"], -math.inf if low is None else low, math.inf if high is None else high)


def _with_frontier(candidates: Sequence[Candidate], buckets: Sequence[str]) -> list[Candidate]:
    """The candidates, those that are dominated with the best of those on the frontier that dominate them."""
    rest = [one for one in candidates if not one.objection]
    frontier = [one for one in rest if not any(_dominates(other, one, buckets) for other in rest)]
    found = []
    for one in candidates:
        above = [] if one.objection else [other for other in frontier if _dominates(other, one, buckets)]
        best = max(above, key=_rank, default=None)
        found.append(one if best is None else replace(one, dominated_by=best.step))
    return found


def _dominates(one: Candidate, other: Candidate, buckets: Sequence[str]) -> bool:
    pairs = [(one.changes[bucket].value, other.changes[bucket].value) for bucket in buckets]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _rank(candidate: Candidate) -> tuple[float, int]:
    return candidate.j.value, -candidate.step


def _part(bucket: str, change: Estimate) -> Estimate:
    """What a bucket adds to J before its weight."""
    ends = np.array([change.value, change.low, change.high])
    return Estimate(*map(float, _counted(bucket, ends)))


def _counted(bucket: str, changes: np.ndarray) -> np.ndarray:
    """A gain as it is; of what is not to be lost, the loss."""
    return changes if bucket == "domain" else np.minimum(changes, 0.0)


def _now(bucket: str, found: Sequence[Measure]) -> float:
    changes = np.array([measure.change().value for measure in found])
    return float(_counted(bucket, changes.mean()))

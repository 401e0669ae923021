"""How far a model is from step 0 in each bucket, on one scale: 0.01 is one point of right answers, or one per cent of a loss.

Items of a bucket are measured in three ways, by the kind of their probe:

=======  ====================================================================================================
right    right or wrong items of all probes together: share right now minus share right at step 0
text     held-out texts of all probes together: by which share of its step-0 value the loss (nats a token) has fallen
mean     each other probe with scores, such as bits per byte of gold answers: by which share its mean has risen
=======  ====================================================================================================

A bucket's change is the mean of its measures; above zero is better. A loss alone would pass a model that lost its in-context
learning at equal perplexity (arXiv 2506.00288), and right answers alone are too noisy to tell two looks of one run apart
(arXiv 2508.13144). What is nothing at step 0 has no share, so two kinds do not count: drift, the distance from the base, and
boundaries, which tell whether documents leak; gates watch them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpt_mega.gates.paired import mean_drop, right_or_wrong
from cpt_mega.gates.probes.boundaries import Boundaries
from cpt_mega.gates.probes.drift import Drift
from cpt_mega.gates.probes.perplexity import Perplexity
from cpt_mega.gates.probes.probe import RIGHT_OR_WRONG, ItemScore, Probe
from cpt_mega.json_types import finite

RIGHT, TEXT, MEAN = "right", "text", "mean"
_BATCH = 4_000_000  # numbers of a resampling at a time


@dataclass(frozen=True)
class Estimate:
    """A number and its two-sided 95 % confidence interval. NaN is that of a model that is lost."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        """``factor`` is at least 0."""
        return Estimate(*(factor * number for number in (self.value, self.low, self.high))) if factor else NOTHING

    def to_json(self) -> dict[str, float | None]:
        """None for a number that JSON cannot hold."""
        return {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high)}


NOTHING = Estimate(0.0, 0.0, 0.0)


def total(parts: Iterable[Estimate]) -> Estimate:
    """The sum of estimates from different items. Each end of its interval is as far away as the ends of the parts are together,
    by their squares, which keeps what is skewed in them (MOVER: Zou and Donner 2008)."""
    parts = list(parts)
    value = math.fsum(part.value for part in parts)
    below, above = (
        math.hypot(*(end - part.value for part, end in ends))
        for ends in ([(part, part.low) for part in parts], [(part, part.high) for part in parts])
    )
    return Estimate(value, value - below, value + above)


@dataclass(frozen=True)
class Measure:
    """Items that are measured together, float64 [n].

    Attributes:
        is_share: of what is right; a change is then counted in points, else as a share of the value at step 0.
        before, now: scores at step 0 and now; higher is better.
        sizes: what each item counts: the target tokens of a text, else 1.
    """

    is_share: bool
    before: np.ndarray
    now: np.ndarray
    sizes: np.ndarray

    @property
    def scale(self) -> float:
        """Of the change; 0 where there is none."""
        return 1.0 if self.is_share else abs(float((self.sizes * self.before).sum() / self.sizes.sum()))

    def change(self) -> Estimate:
        """Since step 0, with the interval that other such items would give."""
        if not np.isfinite(self.now).all():
            return Estimate(math.nan, math.nan, math.nan)
        if self.is_share:
            whole = np.isin(np.concatenate((self.before, self.now)), (0.0, 1.0)).all()
            found = (right_or_wrong if whole else mean_drop)(self.before, self.now)
        else:
            found = mean_drop(np.zeros_like(self.now), self._influences())
        return Estimate(-found.drop, -found.high, -found.low)

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """Changes, [draws], of draws that have each item so many times: ``counts``, [draws, n]."""
        gained, before = counts @ (self.sizes * (self.now - self.before)), counts @ (self.sizes * self.before)
        return gained / (counts @ self.sizes if self.is_share else np.abs(before))

    def _influences(self) -> np.ndarray:
        """Numbers whose mean is the change, and whose scatter is that of a ratio of two means (its linearisation): a text
        adds to it by how far it is from having changed as all others, and not by its length."""
        gained, before = self.sizes * (self.now - self.before), self.sizes * self.before
        whole = before.sum()
        change = gained.sum() / abs(whole)
        return change + len(gained) * (gained - change * math.copysign(1.0, whole) * before) / abs(whole)


class Found(Protocol):
    """What a look found of a probe, as ``suite.Found``."""

    probe: Probe | Drift
    items: Sequence[ItemScore]


def kind_of(probe: Probe | Drift) -> str | None:
    """How a probe's items are measured; None for those that do not count."""
    if isinstance(probe, Drift | Boundaries):
        return None
    if probe.scale == RIGHT_OR_WRONG:
        return RIGHT
    return TEXT if isinstance(probe, Perplexity) else MEAN


def bucket_changes(
    found: Iterable[Found],
    digests: Mapping[str, str],
    baseline: Mapping[str, Mapping[str, float]],
) -> dict[str, dict]:
    """What a look found of each bucket.

    Args:
        digests: of the probes, by name.
        baseline: step-0 scores, ``{digest: {id: score}}``; an item without one does not count.

    Returns, by bucket, ``{"gain", "low", "high", "of": {digest: kind}}`` as ``checkpoint.trainer_state.Score`` has it. Changes
    may be compared where ``of`` is the same. Buckets of which nothing counts are left out.
    """
    of, scores = defaultdict(dict), {}
    for one in found:
        kind, digest = kind_of(one.probe), digests[one.probe.name]
        if kind is not None:
            of[one.probe.bucket][digest] = kind
            scores[digest] = {item.id: (item.score, item.values.get("targets", 1.0)) for item in one.items}
    changes = {bucket: change_of(measures(kinds, scores, baseline)) for bucket, kinds in of.items()}
    return {bucket: _score(change, of[bucket]) for bucket, change in changes.items() if change is not None}


def measures(
    of: Mapping[str, str],
    scores: Mapping[str, Mapping[str, tuple[float, float]]],
    baseline: Mapping[str, Mapping[str, float]],
) -> list[Measure]:
    """The measures of one bucket.

    Args:
        of: the kind of each probe, by digest.
        scores: ``{digest: {id: (score, size)}}``.
        baseline: see ``bucket_changes``.
    """
    rows = defaultdict(list)
    for digest, kind in of.items():
        before = baseline.get(digest, {})
        pairs = ((before[item], *found) for item, found in scores.get(digest, {}).items() if item in before)
        rows[(kind, digest if kind == MEAN else "")] += pairs
    made = [_measure(kind, found) for (kind, _), found in rows.items() if found]
    return [measure for measure in made if measure.scale > 0]


def change_of(found: Sequence[Measure]) -> Estimate | None:
    """The mean of a bucket's measures; None where it has none."""
    return total(measure.change().times(1 / len(found)) for measure in found) if found else None


def resampled_changes(
    a: Sequence[Measure], b: Sequence[Measure], resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A bucket's change at two looks, [resamples] each, of the same draws of its items: what both have in common goes with a
    difference of the two."""
    changes = [], []
    for one, other in zip(a, b, strict=True):
        n = len(one.now)
        step = max(1, _BATCH // n)
        draws = [min(step, resamples - start) for start in range(0, resamples, step)]
        counts = [rng.multinomial(n, np.full(n, 1 / n), size=size) for size in draws]
        for measure, into in zip((one, other), changes, strict=True):
            into.append(np.concatenate([measure.resampled(part) for part in counts]))
    return np.mean(changes[0], axis=0), np.mean(changes[1], axis=0)


def _measure(kind: str, rows: Sequence[tuple[float, float, float]]) -> Measure:
    before, now, sizes = np.array(rows, np.float64).T
    return Measure(kind == RIGHT, before, now, sizes)


def _score(change: Estimate, of: dict[str, str]) -> dict:
    numbers = change.to_json()
    return {"gain": numbers["value"], "low": numbers["low"], "high": numbers["high"], "of": of}

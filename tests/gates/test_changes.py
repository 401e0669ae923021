"""What has changed since step 0 in a bucket, on one scale."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from cpt_mega.gates.changes import Estimate, bucket_changes, total
from cpt_mega.gates.paired import right_or_wrong
from cpt_mega.gates.probes.boundaries import Boundaries
from cpt_mega.gates.probes.drift import Drift
from cpt_mega.gates.probes.perplexity import Perplexity, ScoredDocument
from cpt_mega.gates.probes.probe import OTHER, RIGHT_OR_WRONG, ItemScore


@dataclass
class Found:
    probe: object
    items: list


@dataclass
class Asked:
    """A probe that has only what a change depends on."""

    name: str
    bucket: str
    right: bool

    @property
    def scale(self) -> str:
        return RIGHT_OR_WRONG if self.right else OTHER


def changes(*looks):
    """Of ``(probe, scores at step 0, scores now[, target tokens])``."""
    found, digests, baseline = [], {}, {}
    for probe, before, now, *sizes in looks:
        values = [{"targets": float(size)} for size in sizes[0]] if sizes else [{}] * len(now)
        items = [ItemScore(f"i{n}", score, value) for n, (score, value) in enumerate(zip(now, values, strict=True))]
        found.append(Found(probe, items))
        digests[probe.name] = f"digest of {probe.name}"
        baseline[digests[probe.name]] = {f"i{n}": score for n, score in enumerate(before) if math.isfinite(score)}
    return bucket_changes(found, digests, baseline)


def texts(name="texts", bucket="domain"):
    return Perplexity(name, bucket, [ScoredDocument("i0", np.array([1, 2]))], 8)


def test_right_or_wrong_items_of_all_probes_are_pooled():
    one, other = Asked("one", "general", True), Asked("other", "general", True)
    before, now = [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]
    found = changes((one, before, now), (other, [1] * 4, [0, 1, 1, 1]))
    expected = right_or_wrong(np.array(before + [1] * 4), np.array([*now, 0, 1, 1, 1]))
    (score,) = found.values()
    assert score["gain"] == pytest.approx(-0.2) == -expected.drop and score["low"] == -expected.high
    assert score["of"] == {"digest of one": "right", "digest of other": "right"}


def test_a_loss_counts_by_the_share_that_it_has_fallen_by_and_tokens_are_pooled():
    before, now, tokens = [-2.0, -4.0, -3.0], [-1.5, -3.8, -3.3], [10, 30, 5]
    found = changes((texts(), before, now, tokens))["domain"]
    losses = [np.dot(scores, tokens) / sum(tokens) for scores in (before, now)]
    assert found["gain"] == pytest.approx(1 - losses[1] / losses[0]) and found["low"] < found["gain"] < found["high"]
    alike = changes((texts(), before, [0.9 * score for score in before], tokens))["domain"]
    assert [alike[name] for name in ("gain", "low", "high")] == pytest.approx([0.1] * 3)  # however long each text is


def test_the_interval_of_a_loss_holds_the_truth_in_95_of_100():
    """Texts of many lengths, whose losses all fall by a tenth, more or less: the ratio of two means."""
    rng, held, rounds = np.random.default_rng(7), 0, 300
    for _ in range(rounds):
        tokens, before = rng.integers(5, 400, 60), -rng.uniform(1, 5, 60)
        now = before * (0.9 + rng.normal(0, 0.05, 60))
        found = changes((texts(), before, now, tokens))["domain"]
        held += found["low"] <= 0.1 <= found["high"]
    assert stats.binomtest(held, rounds, 0.95).pvalue > 1e-3


def test_a_bucket_is_the_mean_of_its_measures_and_its_interval_theirs():
    right, bits = Asked("right", "general", True), Asked("bits", "general", False)
    ones = ([1] * 20, [1] * 18 + [0] * 2)
    losses = ([-2.0, -1.0, -3.0], [-1.8, -1.1, -2.0])
    alone = [changes((probe, *scores))["general"] for probe, scores in ((right, ones), (bits, losses))]
    both = changes((right, *ones), (bits, *losses))["general"]
    assert both["gain"] == pytest.approx((alone[0]["gain"] + alone[1]["gain"]) / 2) == (-0.1 + 1.1 / 6) / 2
    below = [one["gain"] - one["low"] for one in alone]
    assert both["gain"] - both["low"] == pytest.approx(math.hypot(*below) / 2)


def test_scores_of_which_more_is_better_rise():
    found = changes((Asked("f1", "safety", False), [0.2, 0.4], [0.3, 0.6]))["safety"]
    assert found["gain"] == pytest.approx(0.5)


def test_what_is_nothing_at_step_0_does_not_count():
    drift, leaks = Drift("drift", "behaviour", [], 8), Boundaries.__new__(Boundaries)
    leaks.name, leaks.bucket = "leaks", "general"
    zero = Asked("zero", "safety", False)
    assert changes((drift, [-0.0], [-3.0]), (leaks, [0.0], [-1.0]), (zero, [0.0, 0.0], [0.0, 1.0])) == {}


def test_a_model_that_is_lost_has_no_number_and_an_item_without_a_baseline_does_not_count():
    lost = changes(
        (texts(), [-1.0, -2.0], [math.nan, -2.0], [3, 4]), (Asked("r", "general", True), [1, 0], [math.nan, 0])
    )
    assert [lost[bucket][name] for bucket in lost for name in ("gain", "low", "high")] == [None] * 6
    never = changes((Asked("r", "general", True), [1, 0, math.nan], [0, 0, 1]))["general"]
    assert never["gain"] == -0.5
    assert changes((Asked("r", "general", True), [math.nan], [1])) == {}
    single = changes((texts(), [-2.0], [-1.0], [3]))["domain"]
    assert (single["gain"], single["low"], single["high"]) == (pytest.approx(0.5), None, None)


def test_ends_that_are_skewed_stay_so_in_a_sum():
    found = total([Estimate(1.0, 0.7, 1.1), Estimate(2.0, 1.6, 2.2)])
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 2.5, 3 + math.hypot(0.1, 0.2)))

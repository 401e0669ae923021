"""Which checkpoint is chosen: the frontier, J on it, and how sure that is."""

import math
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_mega.gates.changes import Measure
from cpt_mega.gates.selection import (
    BUCKETS,
    choose,
    explained,
    healthy_steps,
    objected_steps,
    paired_difference,
    passed_steps,
    steps_to_keep,
)

fixed = partial(settings, deadline=None, derandomize=True)
EQUAL = dict.fromkeys(BUCKETS, 1.0)


def look(step, action="continue", weights=EQUAL, of="a", reach=0.01, **gains):
    scores = {
        bucket: {"gain": gain, "low": gain and gain - reach, "high": gain and gain + reach, "of": {of: "text"}}
        for bucket, gain in gains.items()
    }
    place = {"step": step, "tokens": step * 10, "perplexity": {}, "action": action}
    return place | ({"scores": scores, "weights": weights} if gains else {})


def steps_of(history):
    return {look["step"] for look in history}


def test_the_largest_j_on_the_frontier_is_chosen_and_who_is_dominated_is_told():
    history = [
        look(1, domain=0.10, general=0.02),
        look(2, domain=0.20, general=-0.04),
        look(3, domain=0.19, general=-0.05),  # worse than 2 in both
        look(4, domain=0.25, general=-0.11),
        look(5, domain=0.05, general=0.01),  # worse than 1, and not than 2
    ]
    choice = choose(history, steps_of(history))
    assert choice.step == 2 and choice.next_best.step == 3  # which is dominated, and may be as good in truth
    assert [one.j.value for one in choice.candidates] == pytest.approx([0.10, 0.16, 0.14, 0.14, 0.05])
    assert [one.dominated_by for one in choice.candidates] == [None, None, 2, None, 1]
    assert choice.buckets == ("domain", "general") and choose(history, {1, 4, 5}).step == 4


def test_weights_are_those_of_the_last_look_or_those_that_are_given():
    history = [look(1, domain=0.1, general=0.0), look(2, domain=0.2, general=-0.08, weights=EQUAL | {"general": 2.0})]
    assert choose(history, {1, 2}).step == 1
    assert choose(history, {1, 2}, {"general": 0.5}).step == 2
    assert choose(history, {1, 2}, {"domain": 0.0}).step == 1
    zero = choose(history, {1, 2}, dict.fromkeys(BUCKETS, 0.0))
    assert zero.step == 1 and zero.next_best.j.value == 0 and "earliest of equals" in explained(zero)[0]


def test_what_no_weight_counts_for_still_decides_who_is_dominated():
    history = [look(1, domain=0.1, safety=0.0), look(2, domain=0.1, safety=0.3)]  # a rise is no regression
    assert choose(history, {1, 2}).step == 2 and choose(history, {1, 2}, {"safety": 0.0}).step == 2


def test_without_a_domain_the_other_buckets_decide():
    choice = choose([look(1, general=-0.1), look(2, general=0.1), look(3, general=0.2)], {1, 2, 3})
    assert choice.step == 3 and choice.buckets == ("general",)


def test_equals_are_the_earlier_one():
    assert choose([look(3, domain=0.1), look(1, domain=0.1), look(2, domain=0.1)], {1, 2, 3}).step == 1


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_what_a_gate_objected_to_is_neither_chosen_nor_dominates(action):
    history = [
        look(1, domain=0.1),
        look(2, action, domain=0.9),
        look(3, "warn", domain=0.2),
        look(4, "none", domain=0.3),
    ]
    choice = choose(history, {1, 2, 3, 4})
    assert choice.step == 4 and [one.dominated_by for one in choice.candidates] == [4, None, 4, None]
    assert action in choice.candidates[1].objection and healthy_steps(history) == [1, 3]
    assert choose(history, {2}).step is None and choose([], {1}).step is None


def test_a_model_that_is_lost_older_looks_and_other_items_are_no_candidates():
    history = [
        look(1),
        look(2, of="b", domain=0.9),
        look(3, domain=None, general=0.1),
        look(4, domain=0.1, general=0.0),
    ]
    choice = choose(history, {1, 2, 3, 4})
    assert choice.step == 4 and choice.next_best is None
    said = [one.objection for one in choice.candidates]
    assert "no items" in said[0] and "other items" in said[1] and "no numbers" in said[2] and not said[3]
    lost = [look(step, domain=None, general=None) for step in (1, 2)]
    assert choose(lost, {1, 2}).step is None and choose([look(1), look(2)], {1, 2}).step is None


def test_the_interval_of_j_is_that_of_its_parts():
    one = choose([look(1, domain=0.2, general=-0.3, behaviour=0.005, reach=0.01)], {1}, {"domain": 3, "general": 4})
    j = one.chosen.j
    assert j.value == pytest.approx(3 * 0.2 - 4 * 0.3)
    assert j.value - j.low == pytest.approx(math.hypot(0.03, 0.04, 0.005))  # behaviour may have dropped by 0.005
    assert j.high - j.value == pytest.approx(math.hypot(0.03, 0.04))
    unknown = look(1, domain=0.2)
    unknown["scores"]["domain"] |= {"low": None, "high": None}
    assert choose([unknown], {1}).chosen.j.high == math.inf


def test_two_sentences_tell_why_and_how_surely():
    history = [look(1, domain=0.10, reach=0.001), look(2, domain=0.20, reach=0.001), look(3, domain=-0.1)]
    apart = explained(choose(history, {1, 2, 3}))
    assert len(apart) == 2 and "Step 2" in apart[0] and "step 1" in apart[1] and "are apart" in apart[1]
    assert "overlap" in explained(choose([look(1, domain=0.10), look(2, domain=0.11)], {1, 2}))[1]
    assert "the base is better" in explained(choose(history, {3}))[0]
    assert "No other" in explained(choose(history, {2}))[1]


@st.composite
def histories(draw):
    buckets = draw(st.lists(st.sampled_from(BUCKETS), min_size=1, unique=True))
    number = st.one_of(st.none(), st.integers(-3, 3).map(lambda n: n / 10))
    actions = st.sampled_from(["none", "continue", "warn", "stop", "roll_back"])
    count = draw(st.integers(1, 7))
    return [look(step, draw(actions), **{b: draw(number) for b in buckets}) for step in range(1, count + 1)]


WEIGHTS = st.fixed_dictionaries({bucket: st.sampled_from([0.0, 0.5, 1.0, 3.0]) for bucket in BUCKETS})


def values(history, step):
    (found,) = [look for look in history if look["step"] == step]
    return {bucket: score["gain"] for bucket, score in found["scores"].items()}


@fixed(max_examples=100)
@given(history=histories(), weights=WEIGHTS, seed=st.integers(0, 9))
def test_the_choice_is_never_dominated_has_the_largest_j_and_does_not_depend_on_the_order(history, weights, seed):
    good = {
        look["step"]
        for look in history
        if look["action"] not in ("stop", "roll_back") and None not in values(history, look["step"]).values()
    }
    choice = choose(history, steps_of(history), weights)
    assert (choice.step in good) if good else choice.step is None
    for step in good:
        other, chosen = values(history, step), values(history, choice.step)
        assert other == chosen or any(chosen[bucket] > other[bucket] for bucket in chosen)
        j, best = (
            sum(weights[b] * (v if b == "domain" else min(v, 0)) for b, v in each.items()) for each in (other, chosen)
        )
        assert j <= best + 1e-12
    shuffled = random.Random(seed).sample(history, len(history))
    assert choose(shuffled, steps_of(history), weights) == choice


def measured(before, *nows):
    before = np.array(before, np.float64)
    return [{"general": [Measure(True, before, np.array(now, np.float64), np.ones(len(before)))]} for now in nows]


def test_the_difference_of_two_is_of_the_same_items():
    """Both lost much, and each of the same 100 items but one: since step 0 nothing is sure, of the difference all is."""
    before = [1.0] * 400
    a, b = [0.0] * 100 + [1.0] * 300, [0.0] * 140 + [1.0] * 260
    found = paired_difference(*measured(before, a, b), EQUAL)
    assert found.value == pytest.approx(0.1) and 0.06 < found.low < 0.1 < found.high < 0.14
    reach = 1.96 * math.sqrt(0.1 * 0.9 / 400)  # of 40 items of 400, and no more
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.1)
    assert found == paired_difference(*measured(before, a, b), EQUAL)
    assert paired_difference(*measured(before, a, a), EQUAL) == paired_difference(
        *measured(before, a, b), {"general": 0}
    )
    same = paired_difference(*measured(before, a, a), EQUAL)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_rise_does_not_count_in_a_difference_but_in_the_domain():
    before, a, b = [0.0] * 50 + [1.0] * 50, [1.0] * 100, [0.0] * 40 + [1.0] * 60
    general = measured(before, a, b)
    assert paired_difference(*general, EQUAL).value == 0
    domain = [{"domain": found["general"]} for found in general]
    assert paired_difference(*domain, EQUAL).value == pytest.approx(0.4)


def test_of_a_single_item_nothing_is_known():
    found = paired_difference(*measured([1.0], [1.0], [0.0]), EQUAL)
    assert found.value == 1 and (found.low, found.high) == (-math.inf, math.inf)


def test_what_a_gate_goes_back_to_has_not_even_a_warning():
    actions = ["none", "continue", "warn", "continue", "stop", "anneal"]
    history = [{"step": step, "action": action} for step, action in enumerate(actions)]
    assert passed_steps(history) == [1, 3]
    history[3]["doubtful"] = ["general"]
    assert passed_steps(history) == [1] and 3 in healthy_steps(history)


def test_harm_that_was_only_warned_of_is_not_chosen_and_too_little_gain_is_no_harm():
    harmed = look(2, "warn", domain=0.5, general=0.0) | {"objections": {"general": "hard"}}
    soft = look(3, "warn", domain=0.4, general=0.0) | {"objections": {"general": "soft", "domain_gain": "hard"}}
    history = [look(1, domain=0.1, general=0.0), harmed, soft]
    assert choose(history, {1, 2, 3}).step == 3
    assert objected_steps(history) == {2} and healthy_steps(history) == [1, 3] and passed_steps(history) == [1]
    stopped = look(4, "stop", domain=0.5, general=0.0) | {"objections": {"domain_gain": "hard"}}
    assert choose([*history, stopped], {1, 2, 3, 4}).step == 4  # a run that ended early is as good as it is
    assert objected_steps([look(5, "roll_back", domain=0.5)]) == {5}  # of an older version


def test_what_must_stay_is_the_healthy_the_best_and_what_is_gone_back_to():
    warned = look(4, "warn", domain=0.2, general=0.0) | {"objections": {"general": "soft"}}
    harmed = look(2, "warn", domain=0.9, general=0.0) | {"objections": {"general": "hard"}}
    assert steps_to_keep([], {0, 2}, 0) == {0}
    assert steps_to_keep([harmed, warned], {0, 2, 4}, 0) == {0, 4}  # as long as no look was passed
    passed = look(6, domain=0.1, general=0.0)
    assert steps_to_keep([harmed, warned, passed], {0, 2, 4, 6}, 0) == {4, 6}
    assert steps_to_keep([passed, harmed], {7, 2}, 7) == {7}  # a fork: what was passed lies in another folder

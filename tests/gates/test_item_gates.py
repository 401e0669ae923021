"""Items of a bucket against step 0."""

import json
import math
import random

import pytest

from cpt_mega.gates.item_gates import ItemGate, apparent_drop, decide, verdict_of
from cpt_mega.gates.verdict import LookScores, outcome

GATE = ItemGate("general", ("a", "b"), True, 0.04, "roll_back")


def look(before: dict, now: dict) -> LookScores:
    return LookScores(5, 500, {}, {}, before, now)


def half_right(count: int, name: str = "i") -> dict[str, float]:
    return {f"{name}{n}": float(n % 2) for n in range(count)}


def lose(scores: dict[str, float], share: float, seed: int = 0) -> dict[str, float]:
    """With so many of all items wrong that were right."""
    right = sorted(item for item, score in scores.items() if score == 1)
    gone = set(random.Random(seed).sample(right, round(share * len(scores))))
    return {item: 0.0 if item in gone else score for item, score in scores.items()}


def verdict(before: dict, now: dict, gate: ItemGate = GATE, history=(), looks: int = 20):
    decision = decide(gate, look(before, now), 0.05, looks)
    return verdict_of(gate, decision, decision.confirmed, history, apparent_drop(gate, look(before, now)))


def test_a_drop_of_twice_the_threshold_is_confirmed_and_half_of_it_is_not():
    before = {"a": half_right(500), "b": half_right(500)}
    found = verdict(before, {name: lose(scores, 0.08) for name, scores in before.items()})
    assert (found.level, found.action) == ("hard", "roll_back")
    assert "80 items lost and 0 gained of 1000, a drop of 8.0 points" in found.reason and "for 4 points" in found.reason
    assert found.numbers["together"]["n"] == 1000 and found.numbers["main"]["n"] + found.numbers["reserve"]["n"] == 1000
    json.dumps(found.to_json(), allow_nan=False)
    found = verdict(before, {name: lose(scores, 0.02) for name, scores in before.items()})
    assert (found.level, found.action) == ("none", "continue") and found.numbers["reserve"] is None


@pytest.mark.parametrize(("share", "doubtful"), [(0.0, False), (0.02, False), (0.05, True)])
@pytest.mark.parametrize("binary", [True, False])
def test_a_drop_of_the_threshold_that_is_not_confirmed_is_nothing_to_go_back_to(share, doubtful, binary):
    """So few items cannot confirm it; of answers it is a share of their bits per byte."""
    gate = GATE if binary else ItemGate("answers", ("a", "b"), False, 0.04, "roll_back")
    before = {"a": half_right(100) if binary else {f"i{n}": -2.0 - n % 3 for n in range(100)}}
    scattered = {item: score + 6 * (-1) ** n - 3 * share for n, (item, score) in enumerate(before["a"].items())}
    now = lose(before["a"], share) if binary else scattered
    found = verdict(before, {"a": now}, gate)
    assert found.level == "none" and found.doubtful == doubtful
    assert "doubtful" not in found.to_json() and outcome([found]).get("doubtful", []) == [gate.name] * doubtful


def test_what_the_reserve_does_not_confirm_is_a_warning():
    before = {"a": half_right(600), "b": {}}
    decision = decide(GATE, look(before, before), 0.05, 20)
    assert not decision.fired
    main = {  # only items of the main panel are lost
        item: 0.0
        for item in before["a"]
        if decide(
            GATE, look({"a": before["a"]}, {"a": before["a"] | {item: 1 - before["a"][item]}}), 0.05, 20
        ).main.lost
    }
    lost = dict(list(main.items())[:40])
    found = verdict(before, {"a": before["a"] | lost, "b": {}})
    assert (found.level, found.action) == ("soft", "warn") and "reserve does not confirm" in found.reason


def test_patience_waits_for_looks_that_confirm_it_one_behind_the_other():
    gate = ItemGate("general", ("a",), True, 0.04, "stop", patience=3)
    before = {"a": half_right(1000)}
    now = {"a": lose(before["a"], 0.1)}
    hard, soft = ({"objections": {"general": level}} for level in ("hard", "soft"))
    seen = [verdict(before, now, gate, history) for history in ([], [hard], [hard, soft, hard], [hard, hard])]
    assert [one.action for one in seen] == ["warn", "warn", "warn", "stop"] and {one.level for one in seen} == {"hard"}
    assert "2 of 3 looks" in seen[1].reason and "looks" not in seen[3].reason


def test_a_lost_model_has_lost_all_it_had_right_and_no_baseline_is_no_item():
    before = {"a": half_right(300), "b": {}}
    now = {"a": dict.fromkeys(before["a"], math.nan) | {"new": 1.0}, "b": {"other": 0.0}}
    found = verdict(before, now)
    assert found.level == "hard" and "150 items lost and 0 gained of 300" in found.reason


def test_without_items_in_both_panels_nothing_is_decided():
    assert decide(GATE, look({}, {}), 0.05, 20) is None
    assert decide(GATE, look({"a": {"x": 1.0}}, {"a": {"x": 0.0}}), 0.05, 20) is None


def test_noise_widens_what_a_drop_is_tested_against():
    before = {"a": half_right(1000), "b": {}}
    now = {"a": lose(before["a"], 0.055), "b": {}}
    noisy = ItemGate("general", ("a", "b"), True, 0.04, "stop", noise=0.019)
    assert verdict(before, now).level == "hard" and verdict(before, now, noisy).level != "hard"


@pytest.mark.parametrize(("rise", "level"), [(0.0, "none"), (0.04, "none"), (0.2, "hard"), (math.nan, "hard")])
def test_answers_are_compared_by_a_share_of_their_bits(rise, level):
    gate, draw = ItemGate("answers", ("a",), False, 0.1, "stop"), random.Random(1)
    before = {"a": {f"i{n}": -draw.uniform(0.5, 1.5) for n in range(200)}}
    now = {"a": {item: score * (1 + rise + draw.gauss(0, 0.05)) for item, score in before["a"].items()}}
    found = verdict(before, now, gate)
    assert found.level == level and "10.0% of the bits per byte" in found.reason
    json.dumps(found.to_json(), allow_nan=False)

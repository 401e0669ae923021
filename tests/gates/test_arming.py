"""From a suite's rules to gates."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cpt_mega.config.load import build_config
from cpt_mega.errors import InputError
from cpt_mega.gates.arming import armed, disagreement, notes_on, planned_judge, powers
from cpt_mega.gates.paired import gate_items, smallest_threshold
from cpt_mega.gates.probes.probe import ItemScore
from cpt_mega.gates.suite import Suite
from cpt_mega.gates.suite_schema import RuleOptions


def probe(name: str, bucket: str, items: int, scale: str = "right_or_wrong"):
    return SimpleNamespace(name=name, bucket=bucket, scale=scale, ids=[f"{name}{n}" for n in range(items)])


def suite(*probes, **rules) -> Suite:
    return Suite("s", 64, probes, {one.name: one.name for one in probes}, rules=RuleOptions(**rules))


def config(**gates):
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "train": {"tokens": 100_000},
        "data": {"sources": [{"name": "a", "path": "a", "role": "domain"}]},
        "eval": {"interval_tokens": 10_000, "dense_start": False},
        "gates": gates,
    }
    return build_config(values)


def gates_of(judge) -> dict:
    return {gate.name: gate for gate in judge.item_gates}


def test_items_of_a_bucket_are_taken_together_and_gates_have_their_usual_thresholds():
    probes = (probe("a", "general", 1500), probe("b", "general", 1500), probe("c", "behaviour", 900))
    probes += (probe("d", "general", 200, "bits_per_byte"), probe("e", "domain", 500), probe("f", "safety", 9, "other"))
    judge = planned_judge(config(action="roll_back"), suite(*probes, behaviour={"action": "warn", "patience": 2}))
    found = gates_of(judge)
    assert found.keys() == {"general", "behaviour", "answers"}
    assert (found["general"].probes, found["general"].threshold, found["general"].action) == (
        ("a", "b"),
        0.03,
        "roll_back",
    )
    assert (found["behaviour"].threshold, found["behaviour"].action, found["behaviour"].patience) == (0.05, "warn", 2)
    assert (found["answers"].binary, found["answers"].threshold) == (False, 0.1)
    assert judge.looks == 10 and judge.perplexity_action == "roll_back" and judge.gain.from_tokens == 1000
    assert not any(gate.disarmed for gate in judge.item_gates)


def test_held_out_sets_alone_have_the_rule_of_perplexity():
    judge = planned_judge(config(), Suite("eval.sets", 64, (), {}))
    assert judge.item_gates == () and judge.gain is None and judge.perplexity_limit == 0.15


def test_a_gate_without_a_threshold_goes_with_what_its_items_show_or_does_not_judge():
    judge = planned_judge(config(), suite(probe("a", "general", 1000), probe("c", "safety", 60)))
    found = gates_of(judge)
    assert 0.03 < found["general"].threshold < 0.06 and not found["general"].disarmed
    assert found["safety"].disarmed == "60 items show no drop below 25 points"
    notes = list(notes_on(judge))
    assert "gate general is for drops of 4." in notes[0] and "points, usual are 3 points" in notes[0]
    assert notes[1].startswith("gate safety is not armed: 60 items") and len(notes) == 2


def test_a_threshold_that_was_chosen_is_not_scolded():
    """Nor is that of answers, a share of their bits, told as points."""
    probes = (probe("a", "general", 1000), probe("d", "general", 200, "bits_per_byte"))
    judge = planned_judge(config(), suite(*probes, general={"threshold": 0.08}, answers={"threshold": 0.2}))
    assert list(notes_on(judge)) == [] and gates_of(judge)["answers"].threshold == 0.2
    blind = suite(*probes, general={"threshold": 0.01, "accept_blind": True})
    assert list(notes_on(planned_judge(config(), blind))) == []


@pytest.mark.parametrize(("items", "panels"), [(1, "0 and 1"), (2, "0 and 2"), (6, "1 and 5")])
def test_a_gate_whose_items_leave_a_panel_empty_or_too_small_for_a_mean_is_not_armed_and_that_is_said(items, panels):
    some = suite(probe("d", "general", items, "bits_per_byte"), answers={"threshold": 0.1})
    (power,) = powers(some.rules, some, 10)
    assert power.gate.disarmed.startswith(f"{items} items fall into panels of {panels}, and each needs 2")
    assert power.to_json()["armed"] is False and power.to_json()["disarmed"] == power.gate.disarmed
    (note,) = notes_on(planned_judge(config(), some))
    assert note.startswith(f"gate answers is not armed: {items} items fall")


def test_a_gate_of_answers_with_two_in_each_panel_is_armed():
    some = suite(probe("d", "general", 9, "bits_per_byte"))
    (power,) = powers(some.rules, some, 10)
    assert not power.gate.disarmed and power.to_json()["armed"] and power.to_json()["disarmed"] is None


def test_a_suite_that_was_cut_is_told_to_ask_more_of_its_own_items():
    cut = replace(suite(probe("a", "general", 1000), general={"threshold": 0.01}), cut="a look asks fewer")
    with pytest.raises(InputError, match="gates.look_share") as refusal:
        planned_judge(config(), cut)
    assert "give more items" not in str(refusal.value)


def test_a_threshold_below_what_the_items_show_is_refused_unless_accepted():
    blind = {"general": {"threshold": 0.01}}
    with pytest.raises(
        InputError, match=r"rules\.general\.threshold.*0\.01.*1,000 items can carry 0\.0\d+.*accept_blind"
    ):
        planned_judge(config(), suite(probe("a", "general", 1000), **blind))
    accepted = suite(probe("a", "general", 1000), general={"threshold": 0.01, "accept_blind": True})
    assert gates_of(planned_judge(config(), accepted))["general"].threshold == 0.01
    assert gates_of(planned_judge(config(), suite(probe("a", "general", 9), general=None))) == {}
    with pytest.raises(InputError, match="can carry none"):
        planned_judge(config(), suite(probe("a", "general", 3), general={"threshold": 0.5}))


def test_more_gates_and_more_looks_need_more_items():
    two = [probe("a", "general", 1000), probe("c", "safety", 1000)]
    alone, together = (powers(RuleOptions(), suite(*some), 10)[0].smallest for some in (two[:1], two))
    assert alone < together < powers(RuleOptions(), suite(*two), 100)[0].smallest
    assert gate_items(alone, 0.1 + 2 * alone, 0.05, 10) <= 1000 < gate_items(0.99 * alone, 0.1 + 1.98 * alone, 0.05, 10)
    assert smallest_threshold(5, 0.05, 10) == float("inf")


def test_a_gate_whose_own_disagreement_explains_its_threshold_is_not_armed():
    judge = planned_judge(config(), suite(probe("a", "general", 1500), probe("b", "general", 1500)))
    sizes = {"a": 1500, "b": 1500}
    assert armed(judge, {}, sizes) == judge
    (gate,) = armed(judge, {"a": 0.02}, sizes).item_gates
    assert gate.noise == 0.01 and not gate.disarmed
    (gate,) = armed(judge, {"a": 0.02, "b": 0.01}, sizes).item_gates
    assert "step 0 scored twice differs by 1.5%" in gate.disarmed


def test_disagreement_is_of_items_or_a_share_of_their_mean():
    def scored(*values):
        return [ItemScore(str(n), value) for n, value in enumerate(values)]

    assert disagreement(probe("a", "general", 4), scored(1, 0, 1, 1), scored(1, 1, 0, 1)) == 0.5
    answers = probe("b", "general", 2, "bits_per_byte")
    assert disagreement(answers, scored(-2.0, -2.0), scored(-2.1, -2.1)) == pytest.approx(0.05)
    assert disagreement(answers, scored(-1.0, 0.0), scored(0.0, -1.0)) == 2.0  # by chance all zeros and ones
    assert disagreement(answers, scored(float("nan")), scored(1.0)) == 0.0

"""Verdicts from numbers."""

import json
import math
from dataclasses import replace

import pytest

from cpt_mega.checkpoint.trainer_state import ON_PERPLEXITY
from cpt_mega.gates.item_gates import ItemGate
from cpt_mega.gates.rules import GAIN, PERPLEXITY, PRICE, GainGate, Judge, domain_gain, domain_price, general_perplexity
from cpt_mega.gates.verdict import LookScores, Verdict, strongest

GAINS = GainGate(threshold=0.005, price=None, patience=3, action="stop", from_tokens=1000, budget_tokens=100_000)


def look(tokens=10_000, domain=None, general=None, base=None, before=None, now=None, step=10) -> LookScores:
    values = {"domain": domain, "general": general}
    perplexity = {bucket: value for bucket, value in values.items() if value is not None}
    return LookScores(step, tokens, base or {"domain": 20.0, "general": 10.0}, perplexity, before or {}, now or {})


def past(*domain: float, tokens: int = 2000) -> list[dict]:
    return [{"tokens": tokens + 1000 * n, "perplexity": {"domain": value}} for n, value in enumerate(domain)]


@pytest.mark.parametrize(
    ("after", "action"), [(9.0, "continue"), (11.5, "continue"), (11.6, "stop"), (math.inf, "stop"), (math.nan, "stop")]
)
def test_general_perplexity_may_rise_by_the_limit_and_no_more(after, action):
    (verdict,) = general_perplexity({"general": 10.0, "domain": 5.0}, {"general": after, "domain": 99.0}, 0.15)
    assert verdict.action == action and verdict.level == ("hard" if action == "stop" else "none")
    assert verdict.numbers["baseline"] == 10.0
    assert "step-0 value 10" in verdict.reason and "+15%" in verdict.reason
    json.dumps(verdict.to_json(), allow_nan=False)


def test_without_a_general_bucket_there_is_no_verdict():
    assert general_perplexity({"domain": 5.0}, {"domain": 6.0}, 0.15) == []


def test_a_domain_that_gains_too_little_at_so_many_looks_on_end_stops_the_run_and_says_what_is_left():
    flat = 20.0**0.996  # 0.4 % of the loss below
    verdicts = [domain_gain(GAINS, look(domain=flat), past(*[flat] * count))[0] for count in range(3)]
    assert [verdict.level for verdict in verdicts] == ["soft", "soft", "hard"]
    assert [verdict.action for verdict in verdicts] == ["continue", "continue", "stop"]
    assert "90,000 of 100,000 tokens are left" in verdicts[-1].reason and "0.40% below" in verdicts[-1].reason
    (gained,) = domain_gain(GAINS, look(domain=20.0**0.99), past(flat, flat, flat))
    assert (gained.level, gained.action) == ("none", "continue")
    (again,) = domain_gain(GAINS, look(domain=flat), past(flat, flat, 20.0**0.99, flat))
    assert again.numbers["missed"] == 2 and again.action == "continue"


def test_looks_while_the_rate_is_rising_say_nothing_of_the_gain():
    flat = past(20.0, 20.0, 20.0, tokens=-2000)
    assert domain_gain(GAINS, look(tokens=1000, domain=20.0), flat) == []
    (first,) = domain_gain(GAINS, look(tokens=1001, domain=20.0), flat)
    assert first.numbers["missed"] == 1


def test_a_domain_that_was_not_measured_at_step_0_has_no_gain():
    late = LookScores(10, 10_000, {"domain": 20.0}, {"domain": 20.0}, {}, {}, since={"domain": 9_000})
    assert domain_gain(GAINS, late, past(20.0, 20.0, 20.0)) == []
    assert domain_gain(GAINS, look(domain=20.0), past(20.0, 20.0, 20.0))[0].level == "hard"


def test_a_domain_that_is_not_measured_or_not_a_number():
    assert domain_gain(GAINS, look(general=10.0), []) == []
    (lost,) = domain_gain(GAINS, look(domain=math.nan), [])
    assert lost.level == "soft"
    json.dumps(lost.to_json(), allow_nan=False)


def test_gain_that_costs_more_than_its_price():
    gate = GainGate(0.005, price=1e4, patience=2, action="anneal", from_tokens=1000, budget_tokens=100_000)
    assert domain_price(gate, look(domain=19.0), []) == []  # nothing to compare with
    losses = [3.0, 2.9, 2.895, 2.894]  # nats, a thousand tokens apart: 1e5, 5e3, 1e3 a billion
    history = past(*map(math.exp, losses))
    now = look(tokens=6000, domain=math.exp(2.8939))
    (verdict,) = domain_price(gate, now, history)
    assert (verdict.rule, verdict.level, verdict.action) == (PRICE, "hard", "anneal")
    assert verdict.numbers["missed"] == 3 and verdict.numbers["fall"] == pytest.approx(100)
    (fine,) = domain_price(gate, look(tokens=6000, domain=math.exp(2.8)), history)
    assert fine.level == "none"


def test_the_strongest_action_is_taken():
    said = [Verdict(str(n), "", action, "") for n, action in enumerate(["continue", "roll_back", "warn", "anneal"])]
    assert strongest(said) == "roll_back" and strongest([]) == "continue"
    assert strongest([*said, Verdict("x", "hard", "stop", "")]) == "stop"


def scores(right: int, of: int, start: int = 0) -> dict[str, float]:
    return {f"{n:04d}": float(start <= n < start + right) for n in range(of)}


def test_several_gates_share_the_error_of_a_look():
    """A drop that one gate alone confirms does not count where another gate's share of the error is not there for it."""
    gates = [ItemGate(name, (name,), True, 0.04, "stop") for name in ("general", "safety")]
    before = {gate.name: scores(900, 1000) for gate in gates}
    kept = {"safety": before["safety"]}
    now = {**kept, "general": scores(840, 1000, start=60)}
    (found,) = Judge(tuple(gates[:1])).verdicts(look(before=before, now=now), [])
    alpha = 1.5 * found.numbers["p_value"]  # enough for one, too little for the first of two
    alone, both = (Judge(tuple(some), alpha).verdicts(look(before=before, now=now), []) for some in (gates[:1], gates))
    assert [verdict.level for verdict in alone] == ["hard"]
    assert [verdict.level for verdict in both] == ["soft", "none"]


def test_all_rules_speak_and_a_judge_survives_the_ledger():
    gates = (ItemGate("general", ("a",), True, 0.04, "roll_back", 2, 0.01), ItemGate("x", ("b",), True, 0.1, "stop"))
    judge = Judge(gates, 0.05, 7, 0.15, "anneal", GAINS)
    assert Judge.from_json(json.loads(json.dumps(judge.to_json()))) == judge
    before = {"a": scores(50, 100), "b": scores(50, 100)}
    said = judge.verdicts(look(domain=15.0, general=12.0, before=before, now=before), [])
    assert [verdict.rule for verdict in said] == ["general", "x", "general_perplexity_limit", GAIN]
    assert said[2].action == "anneal"
    with pytest.raises(ValueError, match="no rules"):
        Judge.from_json({"item_gates": [{"name": 1}]})


def test_a_checkpoint_knows_the_rules_that_look_at_perplexity_alone():
    assert {PERPLEXITY, GAIN, PRICE} == ON_PERPLEXITY


def test_a_judge_knows_whether_it_may_roll_a_run_back():
    back = {"perplexity_limit": 0.15, "perplexity_action": "roll_back"}
    assert Judge(**back).may_roll_back({"domain", "general"}) and not Judge(**back).may_roll_back({"domain"})
    assert not Judge(perplexity_action="roll_back").may_roll_back({"general"})
    gain = GainGate(0.005, None, 3, "roll_back", 0, 1)
    assert Judge(gain=gain).may_roll_back({"domain"}) and not Judge(gain=gain).may_roll_back({"general"})
    gate = ItemGate("general", ("a",), True, 0.04, "roll_back")
    assert Judge((gate,)).may_roll_back(()) and not Judge((replace(gate, disarmed="noise"),)).may_roll_back(())
    assert Judge(functions=("own.py:rule",)).may_roll_back(()) and not Judge().may_roll_back({"general"})

"""What a user reads when a gate finds harm."""

import dataclasses

import pytest

from cpt_mega.gates.diagnosis import Evidence, debugging_order, harmed_buckets, stage_reading

RUN = Evidence(
    peak_lr=2e-4,
    warmup_share=0.01,
    has_template=False,
    replay_share=0.05,
    passes={"domain": 6.2, "replay": 0.1},
    odd_rows=3,
    fill={"domain": 0.9991},
    split={"domain": 0.125},
    grad_norm=3.0,
    usual_norm=1.5,
    refused=2,
    kl={"drift": 0.25},
    healthy_step=400,
    run_dir="runs/a",
    tokens=5000,
    budget=100_000,
)


def test_the_order_has_the_runs_own_numbers():
    lines = debugging_order(RUN)
    assert [line[:3] for line in lines] == [f"({n})" for n in range(1, 8)]
    assert "peak 0.0002 is above 1e-05 to 5e-05" in lines[0] and "a base model" in lines[0]
    assert "5.0% of the tokens" in lines[1] and "3 odd rows; read more than 4 times: domain 6.2 times" in lines[2]
    assert "99.91% filled, 12.5% of documents split" in lines[3]
    assert "3, 2.00 of the usual; 2 updates refused" in lines[4] and "drift 0.25" in lines[5]
    assert "step 400" in lines[6]
    assert lines[6].endswith(": train.tokens=5000 schedule.warmup_tokens=50 run.dir=runs/a_less")


def test_of_a_model_that_is_only_judged_there_is_no_run_to_look_at():
    (line,) = debugging_order(dataclasses.replace(RUN, budget=0, tokens=0))
    assert line.startswith("(1) drift")


def test_rules_are_about_buckets_but_for_those_of_the_users_own():
    rules = ["general_perplexity_limit", "answers", "safety", "domain_gain", "function:a.py.b"]
    assert harmed_buckets(rules) == {"general", "safety"} and harmed_buckets(rules[3:]) == set()


def test_what_is_not_known_is_said():
    less = {"replay_share": None, "odd_rows": None, "grad_norm": None, "kl": {}, "healthy_step": None, "passes": {}}
    lines = debugging_order(dataclasses.replace(RUN, **less, has_template=True, peak_lr=5e-6))
    assert "within 4e-06 to 1e-05" in lines[0] and "by its chat template" in lines[0]
    assert "no replay source" in lines[1] and "row checks are off" in lines[2]
    assert "no step yet" in lines[4] and "not measured" in lines[5] and "none is left" in lines[6]


def change(gain, spread=0.005):
    return {"gain": gain, "low": gain - spread, "high": gain + spread}


UP, DOWN, STILL = change(0.05), change(-0.05), change(0.002)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain": UP, "general": STILL, "behaviour": STILL, "safety": STILL}, "nothing else is down: go on"),
        ({"domain": UP}, "general, behaviour, safety not measured"),
        ({"domain": UP, "general": STILL, "safety": DOWN}, "safety is down"),
        ({"domain": UP, "general": STILL, "behaviour": DOWN}, "instruct forgetting"),
        ({"domain": STILL, "general": STILL}, "taught nothing"),
        ({"domain": change(0.05, 0.2), "general": STILL}, "domain cannot be told"),
        ({"domain": UP, "general": change(-0.05, 0.2)}, "general cannot be told"),
        ({"domain": UP, "general": DOWN, "behaviour": DOWN}, "general is down"),
        ({"domain": UP, "general": {"gain": None, "low": None, "high": None}}, "general is down"),
        ({"general": STILL}, "domain is not measured"),
    ],
)
def test_the_pattern_of_the_buckets_is_read(changes, words):
    assert words in stage_reading(changes)


def test_a_bucket_in_which_a_gate_found_harm_is_down():
    assert "general is down" in stage_reading({"domain": UP, "general": change(-0.05, 0.2)}, {"general"})

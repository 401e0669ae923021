"""When a run is evaluated: a pure function of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.config.load import build_config
from cpt_mega.gates.looks import early_looks, look_due, look_tokens, looks_share, planned_looks


def _config(gates=None, sections=None, **evaluation):
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "train": {"tokens": 100_000},
        "data": {"sources": [{"name": "a", "path": "a", "role": "domain"}]},
        "eval": evaluation,
        "gates": gates or {},
    }
    return build_config(values | (sections or {}))


def _made(config, size: int) -> int:
    """Looks of a run whose steps have so many tokens, counted step by step."""
    tokens, before, looks = config.train.tokens, 0, 0
    while before < tokens:
        after = before + size
        looks += after >= tokens or look_due(config, before, after)
        before = after
    return looks


@pytest.mark.parametrize(
    ("interval", "points"),
    [
        (10_000, (625, 1250, 2500, 5000)),
        (1_000, (500,)),
        (900, ()),
        (100_000, (781, 1562, 3125, 6250, 12500, 25000, 50000)),
    ],
)
def test_the_first_interval_is_looked_at_by_halves_from_before_one_per_cent_of_the_run(interval, points):
    assert early_looks(_config(interval_tokens=interval)) == points
    assert all(point >= 500 for point in points) and (not points or points[0] < 1000)


def test_a_run_without_an_interval_and_one_that_does_not_want_it_have_no_early_looks():
    assert early_looks(_config()) == early_looks(_config(interval_tokens=10_000, dense_start=False)) == ()


def test_every_look_falls_into_exactly_one_step_whatever_the_steps():
    config = _config(interval_tokens=10_000)
    for size in (100, 333, 600):
        tokens = list(range(0, 30_001, size))
        due = [after for before, after in zip(tokens, tokens[1:], strict=False) if look_due(config, before, after)]
        points = [625, 1250, 2500, 5000, 10_000, 20_000, *([30_000] if tokens[-1] >= 30_000 else [])]
        assert due == [next(t for t in tokens if t >= point) for point in points]


def test_with_a_suite_and_no_interval_looks_are_geometric_from_before_one_per_cent_of_the_run():
    points = early_looks(_config({"suite": "s.yaml"}))
    assert 500 <= points[0] < 1000 and points[-1] == 70_710
    assert all(1.40 < b / a < 1.43 for a, b in zip(points, points[1:], strict=False))
    assert early_looks(_config({"suite": "s.yaml"}, dense_start=False)) == ()


@pytest.mark.parametrize(
    ("gates", "evaluation", "looks"),
    [
        ({}, {}, 1),
        ({}, {"interval_tokens": 10_000}, 4 + 10),
        ({}, {"interval_tokens": 10_000, "dense_start": False}, 10),
        ({}, {"interval_tokens": 30_000, "dense_start": False}, 4),  # and one at the end
        ({"suite": "s.yaml"}, {}, 15 + 1),
        ({}, {"interval_tokens": 1}, 100_000),
    ],
)
def test_as_many_looks_are_planned_as_can_come(gates, evaluation, looks):
    config = _config(gates, **evaluation)
    assert planned_looks(config) == looks
    if looks < 100:
        due = [tokens for tokens in range(1, 100_001) if look_due(config, tokens - 1, tokens)]
        assert len({*due, 100_000}) == looks


@given(
    tokens=st.integers(1, 300),
    intervals=st.tuples(*[st.none() | st.integers(1, 400)] * 2),
    decay=st.none() | st.integers(1, 300),
    rows=st.integers(1, 40),
    has_suite=st.booleans(),
    kind=st.sampled_from(["cosine", "wsd"]),
)
def test_no_more_looks_are_made_than_planned_whatever_the_steps(tokens, intervals, decay, rows, has_suite, kind):
    sections = {
        "train": {"tokens": tokens, "global_batch_size": rows, "micro_batch_size": 1, "seq_length": 1},
        "schedule": {"kind": kind, "warmup_tokens": 0, "decay_tokens": None if decay is None else min(decay, tokens)},
        "checkpoint": {"interval_tokens": intervals[1]},
    }
    config = _config({"suite": "s.yaml"} if has_suite else {}, sections, interval_tokens=intervals[0])
    planned = planned_looks(config)
    assert planned - (kind == "wsd") <= _made(config, 1)  # no more are planned than steps of a token make
    for size in {1, 2, 7, rows, max(1, rows - 1)}:
        if size <= rows:  # a step has no more tokens than its rows hold
            assert _made(config, size) <= planned


@pytest.mark.parametrize(
    ("tokens", "evaluation", "looks"),
    [
        (1_000_000, {"interval_tokens": 10**9}, 8 + 1),  # halves from 0.5 % of the run on, and the end
        (0, {"interval_tokens": 10**9}, 1),
        (0, {}, 1),
        (100_000, {"interval_tokens": 100_000, "dense_start": False}, 1),
    ],
)
def test_what_lies_beyond_the_run_is_no_look(tokens, evaluation, looks):
    assert planned_looks(_config(sections={"train": {"tokens": tokens}}, **evaluation)) == looks


def test_the_look_before_the_decay_is_one_more_where_the_decay_begins_at_a_multiple_of_the_interval():
    """The last step before it and the step that crosses the multiple are two."""
    train = {"tokens": 100_000, "global_batch_size": 7, "micro_batch_size": 1, "seq_length": 100}
    schedule = {"kind": "wsd", "decay_tokens": 20_000}
    sections = {"train": train, "schedule": schedule}
    config = _config(sections=sections, interval_tokens=10_000, dense_start=False)
    assert planned_looks(config) == _made(config, 700) == 11


def test_a_look_may_read_its_share_of_the_computing():
    config = _config({"suite": "s.yaml"}, interval_tokens=10_000, dense_start=False)
    assert look_tokens(config) == pytest.approx(3 * 0.02 * 100_000 / 11)  # and one of step 0
    assert look_tokens(_config({"look_share": None})) == float("inf")
    assert looks_share(config, 3_000) == pytest.approx(3_000 * 11 / 3 / 100_000)

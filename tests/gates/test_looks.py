"""When a run is evaluated: a pure function of tokens."""

import pytest

from cpt_mega.config.load import build_config
from cpt_mega.gates.looks import early_looks, look_due, look_tokens, planned_looks


def _config(gates=None, **evaluation):
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "train": {"tokens": 100_000},
        "data": {"sources": [{"name": "a", "path": "a", "role": "domain"}]},
        "eval": evaluation,
        "gates": gates or {},
    }
    return build_config(values)


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
        ({}, {"interval_tokens": 1}, 100_001),
    ],
)
def test_as_many_looks_are_planned_as_can_come(gates, evaluation, looks):
    config = _config(gates, **evaluation)
    assert planned_looks(config) == looks
    if looks < 100:
        due = [tokens for tokens in range(1, 100_001) if look_due(config, tokens - 1, tokens)]
        assert len({*due, 100_000}) == looks


def test_a_look_may_read_its_share_of_the_computing():
    config = _config({"suite": "s.yaml"}, interval_tokens=10_000, dense_start=False)
    assert look_tokens(config) == pytest.approx(3 * 0.02 * 100_000 / 11)  # and one of step 0
    assert look_tokens(_config({"look_share": None})) == float("inf")

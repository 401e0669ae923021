"""When a run is evaluated: a pure function of tokens."""

import pytest

from cpt_mega.config.load import build_config
from cpt_mega.gates.looks import early_looks, look_due


def _config(**evaluation):
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "train": {"tokens": 100_000},
        "data": {"sources": [{"name": "a", "path": "a", "role": "domain"}]},
        "eval": evaluation,
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

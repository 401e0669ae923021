"""What gates change of a run."""

import json

import pytest

from cpt_mega.errors import CheckpointError
from cpt_mega.gates.steering import Steering


def test_a_run_that_nothing_steers():
    steering = Steering.from_json({})
    assert steering == Steering() and steering.rate(10**9) == 1.0 and steering.ends_at == float("inf")


def test_annealing_takes_the_rate_to_zero():
    steering = Steering(1, 0.5, 1000, 200)
    assert [steering.rate(tokens) for tokens in (1000, 1100, 1200, 1300)] == [0.5, 0.25, 0.0, 0.0]
    assert steering.ends_at == 1200
    assert Steering.from_json(json.loads(json.dumps(steering.to_json()))) == steering


@pytest.mark.parametrize(
    "values", [{"rollbacks": -1}, {"lr_scale": "half"}, {"anneal_from": 5}, {"other": 1}, {"anneal_tokens": 0.5}]
)
def test_values_that_are_none_are_refused(values):
    with pytest.raises(CheckpointError, match="steering"):
        Steering.from_json(values)

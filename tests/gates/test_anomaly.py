"""Which steps stand out and how high the ladder is climbed, on numbers alone."""

import json
import math
import random

import pytest

from cpt_mega.config.schema import AnomalyOptions
from cpt_mega.errors import CheckpointError
from cpt_mega.gates.anomaly import (
    CLIP,
    LOWER,
    MIN_STEPS,
    NONE,
    ROLL_BACK,
    SKIP,
    AnomalyState,
    accept,
    alarm,
    blamed,
    expect_change,
    first_losses,
    judge,
    rollback_target,
    rolled_back,
)

OPTIONS = AnomalyOptions()
EXPECTED = first_losses({"domain": math.exp(3.0), "general": math.exp(2.5)}, 1000)


def healthy(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses that fall and norms that scatter, as a run's do."""
    draw = random.Random(seed)
    return [
        (2 + math.exp(-step / 500) + draw.gauss(0, 0.08), 0.5 * math.exp(draw.gauss(0, 0.2))) for step in range(steps)
    ]


def after(steps: int) -> AnomalyState:
    state = AnomalyState()
    for step, (loss, norm) in enumerate(healthy(steps), 1):
        accept(state, OPTIONS, step, loss, norm)
    return state


@pytest.mark.parametrize("steps", [0, 1, 5, MIN_STEPS, 100, 500])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_what_is_not_finite_is_refused_from_the_first_step_on(steps, loss, norm):
    assert judge(after(steps), OPTIONS, EXPECTED, loss, norm).what == SKIP


@pytest.mark.parametrize("steps", [0, 1, 5, MIN_STEPS - 1, MIN_STEPS, 100, 500])
def test_a_loss_three_times_the_usual_is_refused_from_the_first_step_on(steps):
    usual = healthy(500)[max(0, steps - 1)][0]
    finding = judge(after(steps), OPTIONS, EXPECTED, 3 * usual, 0.5)
    assert finding.what == SKIP and finding.why.startswith("loss ")


def test_other_readings_than_of_the_domain_say_nothing_of_the_first_losses():
    assert first_losses({"general": 2.0}, 1000) == first_losses({}, 1000) > first_losses({"domain": 2.0}, 1000)


def test_a_change_of_level_of_a_quarter_is_no_anomaly_and_one_that_the_run_makes_itself_may_be_more():
    state = AnomalyState()
    for step in range(1, 200):
        accept(state, OPTIONS, step, 2.0 + 0.001 * (step % 7), 0.5)
    assert judge(state, OPTIONS, EXPECTED, 2.5, 0.5).what == NONE
    assert judge(state, OPTIONS, EXPECTED, 3.5, 0.5).what == SKIP
    expect_change(state)
    assert judge(state, OPTIONS, EXPECTED, 3.5, 0.5).what == NONE
    assert judge(state, OPTIONS, EXPECTED, 6.0, 0.5).what == SKIP


def test_batches_without_targets_are_not_taken_for_the_usual():
    state = AnomalyState()
    accept(state, OPTIONS, 1, 0.0, 0.0)
    assert judge(state, OPTIONS, EXPECTED, 2.5, 0.5).what == NONE and state.norms == []


def test_a_model_that_was_not_evaluated_may_not_be_worse_than_one_that_knows_nothing():
    expected = first_losses({}, 1000)
    assert judge(AnomalyState(), OPTIONS, expected, math.log(1000), 1.0).what == NONE
    assert judge(AnomalyState(), OPTIONS, expected, 2 * math.log(1000), 1.0).what == SKIP


@pytest.mark.parametrize("seed", range(10))
def test_healthy_numbers_raise_no_alarm(seed):
    state, found = AnomalyState(), []
    for step, (loss, norm) in enumerate(healthy(2000, seed), 1):
        found.append(judge(state, OPTIONS, EXPECTED, loss, norm).what)
        accept(state, OPTIONS, step, loss, norm)
    assert set(found) == {NONE} and len(state.loss_rises) == len(state.norm_rises) == OPTIONS.window_steps


def test_a_large_gradient_is_scaled_down_and_a_huge_one_refused():
    state = after(200)
    finding = judge(state, OPTIONS, EXPECTED, 2.5, 2.5)
    assert finding.what == CLIP and 0.5 < finding.most_norm < 2.5
    assert judge(state, OPTIONS, EXPECTED, 2.5, finding.most_norm).what == NONE
    assert judge(state, OPTIONS, EXPECTED, 2.5, 1e6).what == SKIP
    assert judge(after(5), OPTIONS, EXPECTED, 2.5, 1e6).what == SKIP


def test_outliers_do_not_move_what_they_are_measured_by():
    state = after(200)
    for step in range(201, 207):
        assert judge(state, OPTIONS, EXPECTED, 2.5, 2.5).what == CLIP
        accept(state, OPTIONS, step, 2.5, 2.5)


def test_rows_are_blamed_only_where_they_stand_out_among_others():
    usual = [(60.0, 30.0)] * 7
    for known in (2.0, None):
        assert blamed([*usual, (300.0, 30.0)], known) == [7]
        assert blamed([*usual, (math.nan, 30.0)], known) == [7]
        assert blamed([(300.0, 30.0), (400.0, 30.0), *usual, (0.0, 0.0)], known) == [0, 1]
    assert blamed([(300.0 + row, 30.0) for row in range(8)], 2.0) == []  # the model
    draw = random.Random(1)
    for shift in (0.4, 1.0, 4.0):  # all alike, but for what rows differ by anyway
        for _ in range(100):
            assert len(blamed([(30 * (2 + shift + draw.gauss(0, 0.4)), 30.0) for _ in range(64)], 2.0)) <= 1
    assert blamed([(math.nan, 0.0)] * 3, 2.0) == []
    assert blamed([(math.nan, 30.0)] * 8, 2.0) == []
    assert blamed(usual, 2.0) == []


def test_the_ladder_is_climbed_step_by_step_and_left_after_the_cool_down():
    state, options = after(50), OPTIONS
    rungs = [alarm(state, options, step, [("a", step)]) for step in range(51, 57)]
    assert rungs == [SKIP, SKIP, LOWER, LOWER, LOWER, ROLL_BACK]
    assert state.alarms == list(range(51, 57)) and state.flagged == {"a": list(range(51, 57))}
    assert state.lr_scale == 0.125 and state.calm_step == 56 + options.cool_down_steps
    assert not accept(state, options, state.calm_step - 1, 2.0, 0.5) and state.lr_scale == 0.125
    before = state.calm_step
    assert alarm(state, options, before - 1, []) == SKIP and state.calm_step == before - 1 + options.cool_down_steps
    assert accept(state, options, state.calm_step, 2.0, 0.5)
    assert (state.lr_scale, state.calm_step, state.alarms, state.flagged) == (1.0, None, [], {})


def test_an_episode_that_did_not_lower_the_rate_is_over_after_the_cool_down_too():
    state = after(50)
    assert alarm(state, OPTIONS, 51, [("a", 3)]) == SKIP
    for step in range(52, 52 + OPTIONS.cool_down_steps):
        assert not accept(state, OPTIONS, step, 2.0, 0.5)
    assert (state.alarms, state.flagged, state.calm_step) == ([], {}, None)


def test_refused_updates_far_apart_climb_nothing():
    state = after(50)
    rungs = [alarm(state, OPTIONS, 60 + step * OPTIONS.cool_down_steps, [("a", step)]) for step in range(10)]
    assert set(rungs) == {SKIP} and state.flagged == {"a": [9]}


def test_a_rollback_goes_behind_the_episode_and_further_when_that_did_not_help():
    state = AnomalyState(alarms=[210, 211])
    assert rollback_target(state, OPTIONS, [50, 100, 200, 211, 300]) == 200
    assert rollback_target(state, OPTIONS, [210, 300]) is None
    again = rolled_back(state, 1, 200, 215, 0.5, 315)
    assert (again.rollbacks, again.alarms, again.lr_scale, again.calm_step) == (1, [], 0.5, 315)
    assert rolled_back(AnomalyState(lr_scale=0.25), 1, 200, 215, 0.5, 315).lr_scale == 0.25
    for first in (201, 210, 215 + OPTIONS.cool_down_steps):  # where it came from, too, however far that is from there
        again.alarms = [first]
        assert rollback_target(again, OPTIONS, [50, 100, 200]) == 100
    again.alarms = [215 + OPTIONS.cool_down_steps + 1]
    assert rollback_target(again, OPTIONS, [50, 100, 200]) == 200


def test_the_state_comes_back_from_json_bit_for_bit():
    state = after(300)
    alarm(state, OPTIONS, 301, [("a", 3)])
    assert AnomalyState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert AnomalyState.from_json({}) == AnomalyState()


@pytest.mark.parametrize(
    "values",
    [{"losses": 3}, {"losses": ["x"]}, {"flagged": {"a": ["b"]}}, {"alarms": None}, {"other": 1}, {"lr_scale": "x"}],
)
def test_a_state_that_is_none_is_refused(values):
    with pytest.raises(CheckpointError, match="anomaly window"):
        AnomalyState.from_json(values)

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.mixture import Mixture
from cpt_mega.errors import InputError

WEIGHT = st.floats(0.01, 1)
STEPS = st.lists(st.tuples(st.integers(1, 10**6), WEIGHT, WEIGHT), min_size=1, max_size=5)


def mixture_of(steps):
    at, points = 0, []
    for length, a, b in steps:
        at += length
        points.append((at, {"a": a, "b": b}))
    return Mixture.of(points)


def by_trapezia(mixture, source, begin, end, cuts=2000):
    places = [begin + (end - begin) * cut / cuts for cut in range(cuts + 1)]
    values = [mixture.shares(place)[source] for place in places]
    return sum(values[1:-1], (values[0] + values[-1]) / 2) * (end - begin) / cuts


@given(STEPS, st.integers(0, 10**6), st.integers(1, 10**6))
def test_what_is_due_is_the_integral_of_the_share(steps, begin, length):
    mixture, end = mixture_of(steps), begin + length
    due = [mixture.entitled(source, begin, end) for source in (0, 1)]
    assert sum(due) == pytest.approx(length, rel=1e-9)
    assert due[0] == pytest.approx(by_trapezia(mixture, 0, begin, end), rel=1e-3)


@given(STEPS, st.integers(0, 10**6), st.floats(0, 10**6))
def test_a_deadline_is_where_so_much_is_due(steps, begin, amount):
    mixture = mixture_of(steps)
    place = mixture.deadline(1, begin, amount)
    assert mixture.entitled(1, begin, place) == pytest.approx(amount, rel=1e-9, abs=1e-3)


def test_shares_change_linearly_between_points_and_stay_behind_the_last():
    mixture = Mixture.of([(100, {"a": 3, "b": 1}), (200, {"a": 1, "b": 1})])
    assert [mixture.shares(at) for at in (0, 100, 150, 200, 10**9)] == [
        (0.75, 0.25), (0.75, 0.25), (0.625, 0.375), (0.5, 0.5), (0.5, 0.5),
    ]  # fmt: skip


def test_a_source_may_have_nothing_for_a_while():
    mixture = Mixture.of([(0, {"a": 1, "b": 0}), (100, {"a": 1, "b": 0}), (200, {"a": 0, "b": 1})])
    assert mixture.deadline(1, 0, 0) == 100
    assert mixture.entitled(1, 0, 100) == 0
    assert mixture.deadline(0, 0, 150) == math.inf  # it never gets more
    assert mixture.deadline(0, 0, 149) < 200


def test_json_round_trip():
    mixture = Mixture.of([(5, {"a": 1, "b": 2}), (9, {"a": 1 / 3, "b": 0.1})])
    assert Mixture.from_json(json.loads(json.dumps(mixture.to_json()))) == mixture


def test_without_one_the_others_keep_their_proportions_from_there_on():
    mixture = Mixture.of([(0, {"a": 2, "b": 1, "c": 1}), (10, {"a": 0, "b": 3, "c": 1})])
    assert mixture.without(0, 0) == Mixture.of([(0, {"b": 1, "c": 1}), (10, {"b": 3, "c": 1})])
    b, c = mixture.shares(4)[1:]
    assert mixture.without(0, 4).shares(4) == pytest.approx((b / (b + c), c / (b + c)))
    only_a_first = Mixture.of([(0, {"a": 1, "b": 0}), (10, {"a": 0, "b": 1})])
    assert only_a_first.without(0, 3).shares(3) == (1.0,)


@pytest.mark.parametrize("tokens", [10, 50])
def test_where_nothing_is_asked_of_the_others_any_more_nothing_is_left(tokens):
    fading = Mixture.of([(0, {"a": 1, "b": 1}), (10, {"a": 1, "b": 0})])
    assert fading.without(0, tokens) is None
    assert Mixture.fixed({"a": 1}).without(0, 0) is None


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0, {"a": 1}), (0, {"a": 1})], "tokens = 0: points ascend"),
        ([(0, {"a": 1, "b": 1}), (5, {"a": 1})], "weights = 'b': every point gives a weight to each of a, b"),
        ([(0, {"a": -1, "b": 2})], "data.curriculum a = -1"),
        ([(0, {"a": math.nan, "b": 2})], "data.curriculum a = nan"),
        ([(0, {"a": 1e308, "b": 2})], r"data.curriculum a = 1e\+308"),
        ([(0, {"a": "x", "b": 2})], "data.curriculum a = 'x'"),
        ([(0, {"a": 1, "b": 0}), (5, {"a": 1, "b": 0})], "data.curriculum b = 0: has no share anywhere"),
        ([(0, {"a": 1, "b": 1}), (5, {"a": 0, "b": 0})], "tokens = 5: at this point no source has a share"),
    ],
)
def test_what_is_no_mixture_is_refused(points, message):
    with pytest.raises(InputError, match=message):
        Mixture.of(points)


def test_replay_is_raised_at_each_point_and_the_others_give_way_in_proportion():
    mixture = Mixture.of([(0, {"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.2}), (100, {"a": 0, "b": 0.5, "c": 0.5, "d": 0})])
    raised = mixture.raised({"c"}, 0.1)
    assert raised.names == mixture.names and [tokens for tokens, _ in raised.points] == [0, 100]
    assert raised.shares(0) == pytest.approx((0.35, 0.175, 0.3, 0.175)) and raised.shares(100) == pytest.approx(
        (0, 0.4, 0.6, 0)
    )
    assert mixture.raised({"c"}, 0.9).shares(0)[2] == pytest.approx(0.9)  # at most
    assert mixture.raised({"c"}, 0.0) == mixture.raised({"other"}, 0.5) == mixture
    assert mixture.raised(set(mixture.names), 0.1) == mixture
    most = Mixture.fixed({"a": 0.05, "c": 0.95})
    assert most.raised({"c"}, 0.1) == most

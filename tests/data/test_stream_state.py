import pytest

from cpt_mega.data.mixture import Mixture
from cpt_mega.data.stream_state import SourceState, StreamState
from cpt_mega.errors import InputError

A = Mixture.fixed({"a": 1.0})


def test_json_round_trip():
    halves = Mixture.of([(0, {"a": 1, "b": 3}), (100, {"a": 1, "b": 1})])
    state = StreamState({"a": SourceState(3, 40, 10, 1.5)}, halves, A, 10, {"a": [2, 5]}, ["b"])
    assert StreamState.from_json(state.to_json()) == state
    assert StreamState.from_json(StreamState().to_json()) == StreamState()


def test_another_mixture_starts_a_new_measure():
    state = StreamState({"a": SourceState(3, 40), "gone": SourceState(1, 7)}, A, A)
    assert state.under(A, 8).sources["a"].tokens_under_mixture == 40
    halves = Mixture.fixed({"a": 0.5, "new": 0.5})
    changed = state.under(halves, 8)
    assert changed.sources["a"] == SourceState(3, 40, 40, owed=7)  # of 47 tokens, which were its share
    assert changed.sources["new"] == SourceState()
    assert changed.sources["gone"].tokens == 7
    assert (changed.configured, changed.in_effect, changed.since) == (halves, halves, 47)
    assert state.configured == A and state.since == 0


def test_what_was_decided_during_the_run_stays_until_something_else_is_asked_for():
    state = StreamState().under(Mixture.fixed({"a": 1, "b": 1}), 8)
    state.enter(Mixture.fixed({"a": 9, "b": 1}), 8)
    assert state.under(Mixture.fixed({"a": 1, "b": 1}), 8).in_effect == state.in_effect
    asked = Mixture.fixed({"a": 1, "b": 2})
    assert state.under(asked, 8).in_effect == asked


GOOD = {"sources": {}, "configured": None, "in_effect": None, "since": 0, "excluded": {}, "dropped": []}


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"sources": {}},
        GOOD | {"sources": []},
        GOOD | {"sources": {"a": {"rows_taken": -1}}},
        GOOD | {"sources": {"a": {"rows_taken": "1"}}},
        GOOD | {"sources": {"a": {"rows": 1}}},
        GOOD | {"sources": {"a": 1}},
        GOOD | {"sources": {"a": {"owed": "much"}}},
        GOOD | {"configured": [[0, {"a": "much"}]]},
        GOOD | {"in_effect": [[]]},
        GOOD | {"since": -1},
        GOOD | {"excluded": {"a": ["x"]}},
    ],
)
def test_damage_is_refused(value):
    with pytest.raises(InputError, match="data state"):
        StreamState.from_json(value)

import pytest

from cpt_mega.data.stream_state import SourceState, StreamState
from cpt_mega.errors import InputError


def test_json_round_trip():
    state = StreamState({"a": SourceState(3, 40, 10)}, {"a": 1.0})
    assert StreamState.from_json(state.to_json()) == state


def test_new_weights_start_a_new_measure():
    state = StreamState({"a": SourceState(3, 40), "gone": SourceState(1, 7)}, {"a": 1.0})
    assert state.under({"a": 1.0}).sources["a"].tokens_under_weights == 40
    changed = state.under({"a": 0.5, "new": 0.5})
    assert changed.sources["a"] == SourceState(3, 40, 40)
    assert changed.sources["new"] == SourceState()
    assert changed.sources["gone"].tokens == 7
    assert state.weights == {"a": 1.0}


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"sources": {}},
        {"sources": [], "weights": {}},
        {"sources": {"a": {"rows_taken": -1}}, "weights": {}},
        {"sources": {"a": {"rows_taken": "1"}}, "weights": {}},
        {"sources": {"a": {"rows": 1}}, "weights": {}},
        {"sources": {"a": 1}, "weights": {}},
        {"sources": {}, "weights": {"a": "much"}},
    ],
)
def test_damage_is_refused(value):
    with pytest.raises(InputError, match="data state"):
        StreamState.from_json(value)

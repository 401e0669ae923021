import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.adaptive import adapted_weights

NAMES = ("a", "b", "c", "r", "s")
ROLES = {"a": "domain", "b": "domain", "c": "domain", "r": "replay", "s": "replay"}
SHARES = st.lists(st.floats(0.001, 1), min_size=5, max_size=5).map(
    lambda values: {name: value / sum(values) for name, value in zip(NAMES, values, strict=True)}
)
LOSSES = st.dictionaries(st.sampled_from(NAMES), st.floats(0, 20))


@given(SHARES, LOSSES, st.floats(0, 50), st.floats(1, 8))
def test_roles_keep_their_shares_and_no_source_goes_further_than_the_bound(asked, losses, strength, bound):
    adapted = adapted_weights(asked, ROLES, losses, strength, bound)
    assert adapted.keys() == asked.keys()
    for role in set(ROLES.values()):
        names = [name for name in NAMES if ROLES[name] == role]
        assert sum(adapted[name] for name in names) == pytest.approx(sum(asked[name] for name in names))
    for name, share in asked.items():
        assert share / bound * (1 - 1e-9) <= adapted[name] <= share * bound * (1 + 1e-9)


def test_more_goes_to_where_the_loss_is_higher():
    asked = dict.fromkeys(NAMES, 0.2)
    adapted = adapted_weights(asked, ROLES, {"a": 3.0, "b": 2.0, "c": 2.5, "r": 1.0, "s": 1.0}, 1.0, 2.0)
    assert adapted["a"] > adapted["c"] > adapted["b"] and adapted["r"] == adapted["s"] == pytest.approx(0.2)
    assert adapted["a"] / adapted["b"] == pytest.approx(2.718, rel=0.02)


def test_without_losses_or_strength_nothing_moves():
    asked = {"a": 0.5, "b": 0.1, "c": 0.1, "r": 0.2, "s": 0.1}
    assert adapted_weights(asked, ROLES, {}, 1.0, 2.0) == pytest.approx(asked)
    assert adapted_weights(asked, ROLES, {"a": 1.0, "b": 9.0}, 0.0, 2.0) == pytest.approx(asked)


def test_the_last_bits_of_a_loss_decide_nothing():
    asked, losses = dict.fromkeys(NAMES, 0.2), {"a": 3.0, "b": 2.0}
    other = {name: loss * (1 + 1e-12) for name, loss in losses.items()}
    assert adapted_weights(asked, ROLES, losses, 1.0, 2.0) == adapted_weights(asked, ROLES, other, 1.0, 2.0)

"""The learning rate as a function of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.config.schedule import LearningRate


def _rate(kind, **change):
    values = {"peak": 1e-3, "floor": 1e-4, "warmup_tokens": 100, "decay_tokens": 200, "total_tokens": 1000}
    return LearningRate(kind=kind, **{**values, **change})


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_rewarms_linearly_to_the_peak(kind):
    rate = _rate(kind)
    assert [rate.at(t) for t in (0, 25, 50, 100)] == pytest.approx([0, 2.5e-4, 5e-4, 1e-3])


def test_shapes_after_the_warm_up():
    assert _rate("constant").at(1000) == 1e-3
    assert _rate("cosine").at(550) == pytest.approx((1e-3 + 1e-4) / 2)
    assert [_rate("wsd").at(t) for t in (800, 900, 1000)] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    for kind in ("cosine", "wsd"):
        assert _rate(kind).at(1000) == pytest.approx(1e-4)
        assert _rate(kind).at(5000) == pytest.approx(1e-4)


@given(
    st.sampled_from(["cosine", "constant", "wsd"]),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(1, 10_000),
    st.integers(0, 30_000),
)
def test_stays_between_zero_and_the_peak_and_never_rises_after_the_warm_up(kind, total, warmup, decay, tokens):
    rate = _rate(kind, total_tokens=total, warmup_tokens=min(warmup, total), decay_tokens=decay)
    assert 0 <= rate.at(tokens) <= 1e-3 * (1 + 1e-12)
    if tokens >= rate.warmup_tokens:
        assert rate.at(tokens + 1) <= rate.at(tokens) * (1 + 1e-12)
        assert rate.at(tokens) >= 1e-4 * (1 - 1e-12)

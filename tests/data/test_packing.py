import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.packing import plan_rows
from cpt_mega.errors import InputError

LENGTHS = st.lists(st.integers(0, 60), max_size=80)
METHODS = ("concat", "best_fit")


def tokens_of(plan):
    """Every (document, position) of a plan, in its order."""
    return [
        (document, start + step)
        for row in range(plan.rows)
        for document, start, length in plan.pieces(row)
        for step in range(length)
    ]


@pytest.mark.parametrize("method", METHODS)
@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_every_token_lands_exactly_once(method, lengths, seq_length):
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_length, method)
    expected = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    assert sorted(tokens_of(plan)) == expected
    assert plan.row_tokens.sum() == sum(lengths)
    assert all(0 < tokens <= seq_length for tokens in plan.row_tokens)
    assert (plan.length > 0).all()


@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_best_fit_splits_only_what_is_longer_than_a_row(lengths, seq_length):
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_length, "best_fit")
    pieces = np.bincount(plan.document, minlength=len(lengths))
    assert pieces.tolist() == [-(-length // seq_length) for length in lengths]
    assert plan.split_documents == sum(length > seq_length for length in lengths)


@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_best_fit_is_best_fit_decreasing(lengths, seq_length):
    """As many rows as the textbook algorithm, item by item, opens."""
    rooms = []
    full = sum(length // seq_length for length in lengths)
    for size in sorted((length % seq_length for length in lengths if length % seq_length), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_length) - size)
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_length, "best_fit")
    assert sorted(seq_length - plan.row_tokens) == sorted([0] * full + rooms)


@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_concat_keeps_the_order_and_fills_every_row_but_the_last(lengths, seq_length):
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_length, "concat")
    assert tokens_of(plan) == sorted(tokens_of(plan))
    assert all(tokens == seq_length for tokens in plan.row_tokens[:-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_deterministic(method):
    lengths = np.random.default_rng(0).integers(1, 5000, 2000)
    one, two = plan_rows(lengths, 1024, method), plan_rows(lengths.astype(np.int32), 1024, method)
    for name in ("row_offsets", "document", "start", "length"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_fill_of_a_realistic_corpus():
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 20000).astype(np.int64) + 1
    assert plan_rows(lengths, 4096, "best_fit").fill > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_no_documents_no_rows(method):
    plan = plan_rows(np.array([0, 0]), 8, method)
    assert (plan.rows, plan.fill, plan.split_documents, plan.row_tokens.size) == (0, 1.0, 0, 0)


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="data.packing = 'first_fit'.*best_fit"):
        plan_rows(np.array([1]), 8, "first_fit")


def test_a_row_needs_room():
    with pytest.raises(InputError, match="train.seq_length"):
        plan_rows(np.array([1]), 0)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.best_fit import best_fit_rows
from cpt_mega.data.spreading import FILL, spread_small

DOCUMENTS = 200_000


def descending(lengths, seq_length):
    lengths = np.asarray(lengths, np.int32)
    return np.sort(lengths[(lengths > 0) & (lengths < seq_length)])[::-1]


def spread(sizes, seq_length, most):
    before = best_fit_rows(sizes, seq_length)
    return before, spread_small(sizes, before, seq_length, most)


def fill(sizes, rows, seq_length):
    return sizes.sum() / ((rows.max() + 1) * seq_length)


def lognormal(mean, sigma):
    return lambda random: random.lognormal(mean, sigma, DOCUMENTS) + 1


def web_and_chat(random):
    return np.concatenate([random.lognormal(4, 0.8, DOCUMENTS // 2), random.lognormal(7.5, 1, DOCUMENTS // 2)]) + 1


CORPORA = {"web": lognormal(6, 1.3), "code": lognormal(7, 1.6), "short": lognormal(4.7, 1), "both": web_and_chat}


@pytest.mark.parametrize("seq_length", [2048, 4096, 8192, 32768])
@pytest.mark.parametrize("corpus", CORPORA)
def test_rows_hold_few_documents_and_stay_full(corpus, seq_length):
    sizes = descending(CORPORA[corpus](np.random.default_rng(1)), seq_length)
    before, after = spread(sizes, seq_length, seq_length // 128)
    counts, most = np.bincount(after), seq_length // 128
    assert np.bincount(before).max() > 3 * seq_length // 128, "best fit alone does not pile them up"
    assert counts.max() <= max(most, np.ceil(len(sizes) / len(np.unique(before))))
    assert fill(sizes, after, seq_length) >= FILL


@pytest.mark.parametrize("seq_length", [2048, 8192])
def test_documents_too_small_for_that_are_shared_out_evenly(seq_length):
    sizes = descending(np.random.default_rng(0).integers(1, 40, DOCUMENTS), seq_length)
    before, after = spread(sizes, seq_length, seq_length // 128)
    counts = np.bincount(after)
    assert counts.max() <= 1.15 * counts.mean() + 2
    assert fill(sizes, after, seq_length) >= min(FILL, fill(sizes, before, seq_length))


def test_what_fits_nowhere_else_stays():
    """Long documents that leave no room: only less full rows would hold fewer of the small ones, but for a few."""
    sizes = descending([30] * 4000 + [2040] * 1000, 2048)
    before, after = spread(sizes, 2048, 16)
    assert fill(sizes, after, 2048) >= FILL * fill(sizes, before, 2048)


def test_one_row_too_many_is_taken_apart_where_that_costs_little():
    sizes = descending([2049] * 20_000 + [40] * 200_000, 4096)
    before, after = spread(sizes, 4096, 32)
    assert np.bincount(after).max() == 32
    assert fill(sizes, after, 4096) >= FILL * fill(sizes, before, 4096)


def test_rows_with_few_documents_are_left_alone():
    sizes = descending(np.random.default_rng(0).integers(200, 1000, 5000), 2048)
    before, after = spread(sizes, 2048, 16)
    assert np.array_equal(before, after)


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(0, 6))
def test_every_row_has_room_for_what_is_in_it(lengths, most):
    sizes = descending(lengths, 65)
    before, after = spread(sizes, 64, most)
    assert (np.bincount(after, weights=sizes) <= 64).all()
    assert set(after.tolist()) == set(range(len(set(after.tolist())))), "a row is empty"
    assert len(set(after.tolist())) <= len(set(before.tolist()))


def test_the_same_lengths_give_the_same_rows():
    sizes = descending(CORPORA["both"](np.random.default_rng(2)), 4096)
    assert np.array_equal(spread(sizes, 4096, 32)[1], spread(sizes.copy(), 4096, 32)[1])

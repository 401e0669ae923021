import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.packing import plan_rows
from cpt_mega.engine.dealing import deal_rows

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))  # ranks, micro-batches, rows of each


def works(shape):
    rows = int(np.prod(shape))
    return st.tuples(st.just(shape), st.lists(st.integers(0, 10**6), min_size=rows, max_size=rows))


def busiest(work, dealt):
    totals = [sum(work[row] for batch in rank for row in batch) for rank in dealt]
    return max(totals) / (np.mean(totals) or 1)


@given(SHAPES.flatmap(works))
def test_every_row_goes_to_one_rank_in_batches_of_one_size(case):
    (ranks, batches, size), work = case
    dealt = deal_rows(work, ranks, size)
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(len(work)))
    assert [len(rank) for rank in dealt] == [batches] * ranks
    assert {len(batch) for rank in dealt for batch in rank} == {size}


@given(SHAPES.flatmap(works))
def test_a_rank_begins_with_its_heaviest_micro_batch(case):
    (ranks, _, size), work = case
    for rank in deal_rows(work, ranks, size):
        totals = [sum(work[row] for row in batch) for batch in rank]
        assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("seq_length", [2048, 8192, 32768])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_busiest_rank_does_little_more_than_the_mean(seq_length, ranks):
    """Where that is possible: in a batch with a row that alone is more than a rank's share, it has that row and light ones."""
    random = np.random.default_rng(seq_length + ranks)
    plan = plan_rows(random.lognormal(7, 1.5, 40_000).astype(np.int64) + 1, seq_length)
    for _ in range(20):
        work = random.choice(plan.attention_work, 4 * ranks)
        mean = work.sum() / ranks
        possible = max(1.2, work.max() / mean + 0.3)
        dealt = deal_rows(work, ranks, 1)
        assert busiest(work, dealt) <= possible
        in_turn = [[[row] for row in range(rank, len(work), ranks)] for rank in range(ranks)]
        assert busiest(work, dealt) <= busiest(work, in_turn)


def test_exchanges_find_what_largest_first_misses():
    assert busiest([8, 7, 6, 5, 4, 4], deal_rows([8, 7, 6, 5, 4, 4], 2, 1)) == pytest.approx(1, abs=0.06)


def test_the_same_batch_is_dealt_the_same_way():
    work = np.random.default_rng(0).integers(0, 9, 96).tolist()
    assert deal_rows(work, 8, 2) == deal_rows(list(work), 8, 2)


def test_one_row_a_rank_and_no_work_at_all():
    assert deal_rows([3, 1, 2], 3, 1) == [[[0]], [[2]], [[1]]]
    assert deal_rows([0, 0, 0, 0], 2, 2) == [[[0, 2]], [[1, 3]]]

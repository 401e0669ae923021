import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.packing import PACKING_VERSION, plan_rows
from cpt_mega.errors import InputError

LENGTHS = st.lists(st.integers(0, 60), max_size=80)
METHODS = ("concat", "best_fit")
GOLDEN = ["ac2555e14326", "3d41d7235f22", "55e2cd44b807"]


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
    assert plan.statistics.split_documents == sum(length > seq_length for length in lengths)


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


def test_a_realistic_corpus_fills_its_rows_with_few_documents_each():
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 20000).astype(np.int64) + 1
    found = plan_rows(lengths, 4096, "best_fit").statistics
    assert found.fill > 0.999 and found.most_documents <= 4096 // 128


@pytest.mark.parametrize("method", METHODS)
@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_statistics_are_of_the_plan(method, lengths, seq_length):
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_length, method)
    found, pieces = plan.statistics, np.bincount(plan.document, minlength=1)
    a_row = sorted(len(plan.pieces(row)) for row in range(plan.rows))
    assert (found.rows, found.tokens, found.documents) == (plan.rows, sum(lengths), np.count_nonzero(lengths))
    assert found.padding == plan.rows * seq_length - sum(lengths)
    assert found.split_documents == np.count_nonzero(pieces > 1)
    assert found.most_documents == max(a_row, default=0)
    assert found.documents_a_row_p99 == (a_row[int(np.ceil(0.99 * len(a_row))) - 1] if a_row else 0)


def test_what_is_asked_of_one_row_is_asked_of_all():
    plan = plan_rows(np.random.default_rng(0).integers(1, 90, 300), 64)
    assert [plan.tokens_of(row) for row in range(plan.rows)] == plan.row_tokens.tolist()
    work = [sum(length**2 for _, _, length in plan.pieces(row)) for row in range(plan.rows)]
    assert [plan.attention_work_of(row) for row in range(plan.rows)] == work == plan.attention_work.tolist()


def test_a_document_takes_at_most_sixteen_bytes():
    plan = plan_rows(np.random.default_rng(0).lognormal(6, 1.3, 20000).astype(np.int64) + 1, 4096)
    taken = sum(getattr(plan, name).nbytes for name in ("row_offsets", "document", "start", "length"))
    assert taken <= 16 * plan.length.size


@pytest.mark.parametrize("method", METHODS)
def test_no_documents_no_rows(method):
    plan = plan_rows(np.array([0, 0]), 8, method)
    assert (plan.rows, plan.statistics.fill, plan.statistics.split_documents, plan.row_tokens.size) == (0, 1.0, 0, 0)


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="data.packing = 'first_fit'.*best_fit"):
        plan_rows(np.array([1]), 8, "first_fit")


@pytest.mark.parametrize("seq_length", [0, -1, 2**31])
def test_a_row_has_a_sensible_length(seq_length):
    with pytest.raises(InputError, match="train.seq_length"):
        plan_rows(np.array([5]), seq_length)


def test_another_plan_for_the_same_lengths_is_another_version():
    """A run that goes on after such a change would see rows twice or never: raise PACKING_VERSION with these digests."""
    assert PACKING_VERSION == 2
    random = np.random.default_rng(0)
    web = np.concatenate([random.integers(1, 60, 3000), random.integers(60, 9000, 1000)])
    digests = []
    for lengths, seq_length, method in ((web, 1024, "best_fit"), (web, 4096, "best_fit"), (web, 1024, "concat")):
        plan, digest = plan_rows(lengths, seq_length, method), hashlib.sha256()
        for name in ("row_offsets", "document", "start", "length"):
            digest.update(getattr(plan, name).astype("<i8"))
        digests.append(digest.hexdigest()[:12])
    assert digests == GOLDEN

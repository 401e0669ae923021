import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.packing import plan_rows
from cpt_mega.data.rows import build_row, counted_tokens
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus, masked_corpus, write_corpus


def test_a_row_by_hand(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[10, 11, 12], [20, 21]])
    row = build_row(corpus, plan_rows(corpus.document_lengths, 8), 0, 8, pad_id=9)
    assert row.ids.tolist() == [10, 11, 12, 20, 21, 9, 9, 9]
    assert row.labels.tolist() == [11, 12, 9, 21, 9, 9, 9, 9]
    assert row.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert row.doc_lengths == [3, 2, 3]
    assert (row.ids.dtype, row.labels.dtype, row.loss_mask.dtype) == (np.int64, np.int64, np.float32)


def test_a_document_that_goes_on_in_the_next_row_keeps_its_target(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[10, 11, 12, 13, 14]])
    plan = plan_rows(corpus.document_lengths, 3, "concat")
    first, second = (build_row(corpus, plan, row, 3) for row in range(2))
    assert (first.labels.tolist(), first.loss_mask.tolist()) == ([11, 12, 13], [1, 1, 1])
    assert (second.ids.tolist(), second.loss_mask.tolist()) == ([13, 14, 0], [1, 0, 0])
    assert second.doc_lengths == [2, 1]


def test_an_eos_that_is_the_padding_id_still_counts(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[5, 1], [6, 1]])
    row = build_row(corpus, plan_rows(corpus.document_lengths, 4), 0, 4, pad_id=1)
    assert row.loss_mask.tolist() == [1, 0, 1, 0]


def test_a_corpus_says_which_of_its_tokens_count(tmp_path):
    corpus = masked_corpus(tmp_path / "c", [4, 2], [1, 0, 1, 1, 1, 0])
    plan = plan_rows(corpus.document_lengths, 8)
    row = build_row(corpus, plan, 0, 8, pad_id=9)
    assert row.ids.tolist() == [0, 1, 2, 3, 4, 5, 9, 9]
    assert row.labels.tolist() == [9, 2, 3, 9, 9, 9, 9, 9]
    assert row.loss_mask.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert counted_tokens(corpus, plan, 0) == 4
    split = plan_rows(corpus.document_lengths, 2, "concat")
    assert [build_row(corpus, split, row, 2).loss_mask.tolist() for row in range(3)] == [[0, 1], [1, 0], [0, 0]]
    assert [counted_tokens(corpus, split, row) for row in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("method", ["concat", "best_fit"])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), seq_length=st.integers(1, 24))
def test_targets_are_the_next_token_of_the_same_document_and_none_is_lost(
    tmp_path_factory, method, lengths, seq_length
):
    """Tokens count up through the corpus, so a target is the token plus one, never a document's first."""
    corpus = counting_corpus(tmp_path_factory.mktemp("c") / "c", lengths)
    plan = plan_rows(corpus.document_lengths, seq_length, method)
    ends, seen = set(np.cumsum(lengths) - 1), []
    for number in range(plan.rows):
        row = build_row(corpus, plan, number, seq_length)
        real = int(plan.row_tokens[number])
        assert sum(row.doc_lengths) == len(row.ids) == len(row.labels) == len(row.loss_mask) == seq_length
        assert not row.loss_mask[real:].any() and not row.labels[row.loss_mask == 0].any()
        for token, label, mask in zip(row.ids[:real], row.labels, row.loss_mask, strict=False):
            assert mask == (token not in ends)
            assert not mask or label == token + 1
        seen.extend(row.ids[:real].tolist())
    assert sorted(seen) == list(range(sum(lengths)))


@pytest.mark.parametrize("bad", [100, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_its_document(tmp_path, bad):
    corpus = write_corpus(tmp_path / "c", [[1], [2, bad, 3]])
    plan = plan_rows(corpus.document_lengths, 8)
    with pytest.raises(InputError, match=rf"document 1 = {bad}.*vocabulary of 100"):
        build_row(corpus, plan, 0, 8, vocab_size=100)


def test_an_id_outside_the_vocabulary_is_refused_as_a_target_too(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[1, 2, 100]])
    plan = plan_rows(corpus.document_lengths, 2, "concat")
    with pytest.raises(InputError, match="document 0"):
        build_row(corpus, plan, 0, 2, vocab_size=100)


def test_a_plan_for_longer_rows_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4]])
    with pytest.raises(InputError, match="rows of 8 tokens"):
        build_row(corpus, plan_rows(corpus.document_lengths, 8), 0, 3)

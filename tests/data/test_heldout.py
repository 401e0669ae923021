import pytest

from cpt_mega.data.heldout import heldout_documents
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus


@pytest.mark.parametrize(("max_tokens", "expected"), [(11, 11), (10, 9), (3, 3), (100, 12)])
def test_the_first_tokens_in_document_order(tmp_path, max_tokens, expected):
    corpus = counting_corpus(tmp_path / "c", [4, 5, 3])
    found = heldout_documents(corpus, max_tokens, 100)
    assert [token for _, tokens, _ in found for token in tokens.tolist()] == list(range(expected))
    assert [document for document, _, _ in found] == list(range(len(found)))
    assert all(counts is None for _, _, counts in found)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="vocabulary"):
        heldout_documents(counting_corpus(tmp_path / "c", [4, 5, 3]), 100, 11)


@pytest.mark.parametrize(("lengths", "max_tokens"), [([4], 0), ([4], 1), ([1, 1, 1], 100)])
def test_nothing_to_evaluate_is_refused(tmp_path, lengths, max_tokens):
    """Without a target the perplexity would be 1.0: a perfect baseline, and a gate that never fires."""
    with pytest.raises(InputError, match="eval.sets"):
        heldout_documents(counting_corpus(tmp_path / "c", lengths), max_tokens, 100)

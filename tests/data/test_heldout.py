import pytest

from cpt_mega.data.heldout import heldout_rows
from cpt_mega.data.rows import build_row
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus


@pytest.mark.parametrize(("max_tokens", "expected"), [(10, 10), (3, 3), (100, 12)])
def test_the_first_tokens_in_document_order(tmp_path, max_tokens, expected):
    corpus = counting_corpus(tmp_path / "c", [4, 5, 3])
    plan = heldout_rows(corpus, 4, max_tokens)
    ids = [token for row in range(plan.rows) for token in build_row(corpus, plan, row, 4).ids[: plan.row_tokens[row]]]
    assert ids == list(range(expected))


@pytest.mark.parametrize(("lengths", "max_tokens"), [([4], 0), ([4], 1), ([1, 1, 1], 100)])
def test_nothing_to_evaluate_is_refused(tmp_path, lengths, max_tokens):
    """Without a target the perplexity would be 1.0: a perfect baseline, and a gate that never fires."""
    with pytest.raises(InputError, match="eval.sets"):
        heldout_rows(counting_corpus(tmp_path / "c", lengths), 4, max_tokens)

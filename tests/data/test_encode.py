import numpy as np
import pytest

from cpt_mega.data.encode import TextDocuments
from cpt_mega.data.readers import Batch, Document
from cpt_mega.data.rejects import Reject
from cpt_mega.data.routes import ReferenceRoute
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS


@pytest.fixture
def encoder(tokenizer_folder):
    tokenizer = TextTokenizer.load(tokenizer_folder)
    return TextDocuments(tokenizer, True, ReferenceRoute(tokenizer))


def test_documents_lie_one_behind_the_other(encoder):
    encoded = encoder(Batch([Document("in", 1, text) for text in TEXTS], lines=5, input_bytes=9))
    starts = encoded.lengths.cumsum() - encoded.lengths
    assert encoded.lengths.sum() == encoded.tokens.size and len(encoded.lengths) == len(TEXTS)
    assert (encoded.tokens[starts] == 0).all() and (encoded.tokens[starts + encoded.lengths - 1] == 1).all()
    assert encoded.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (encoded.mask, encoded.lines, encoded.input_bytes) == (None, 5, 9)


def test_empty_documents_take_their_place_among_the_rejects(encoder):
    items = [Document("a", 1, ""), Reject("b", 1, "not UTF-8", ""), Document("c", 1, "x"), Document("d", 1, "")]
    encoded = encoder(Batch(items))
    assert [(reject.path, reject.kind) for reject in encoded.rejects] == [
        ("a", "empty"),
        ("b", "not UTF-8"),
        ("d", "empty"),
    ]
    assert [document.path for document in encoded.kept] == ["c"]


def test_an_id_outside_the_vocabulary_is_not_stored_as_another_token(encoder, monkeypatch):
    wrong = np.array([5, 1 << 16]), np.array([2])  # would be 0 in the corpus' 16 bits
    monkeypatch.setattr(encoder.route, "encode", lambda texts: wrong)
    with pytest.raises(InputError, match="token id = 65536: outside the vocabulary"):
        encoder(Batch([Document("in", 1, "x")]))

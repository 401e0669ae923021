import os
import signal

import numpy as np
import pytest

from cpt_mega.data.encode import ChunkEncoder, encode_chunks
from cpt_mega.data.readers import JsonlChunk
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS, write_jsonl


class FatalChunk:
    """A chunk that kills the worker it reaches, as the kernel does when memory runs out."""

    input_bytes = 0

    def parse(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_work_with_the_reason(tokenizer_folder):
    with pytest.raises(InputError, match="--workers = 2: a worker died.*memory"):
        list(encode_chunks(iter([FatalChunk()]), str(tokenizer_folder), False, 2))


def test_documents_lie_one_behind_the_other(tmp_path, tokenizer_folder):
    data = write_jsonl(tmp_path / "in.jsonl", TEXTS).read_bytes()
    (encoded,) = encode_chunks(iter([JsonlChunk("in", 1, data, "text")]), str(tokenizer_folder), True, 1)
    starts = encoded.lengths.cumsum() - encoded.lengths
    assert encoded.lengths.sum() == encoded.tokens.size and len(encoded.lengths) == len(TEXTS)
    assert (encoded.tokens[starts] == 0).all() and (encoded.tokens[starts + encoded.lengths - 1] == 1).all()
    assert encoded.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_an_id_outside_the_vocabulary_is_not_stored_as_another_token(tokenizer_folder, monkeypatch):
    encoder = ChunkEncoder(str(tokenizer_folder), False)
    wrong = np.array([5, 1 << 16]), np.array([2])  # would be 0 in the corpus' 16 bits
    monkeypatch.setattr(encoder.route, "encode", lambda texts: wrong)
    with pytest.raises(InputError, match="token id = 65536: outside the vocabulary"):
        encoder(JsonlChunk("in", 1, b'{"text": "x"}', "text"))

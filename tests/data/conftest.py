"""Fixtures of the data tests."""

import pytest

from tests.helpers.corpora import write_bpe_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A BPE tokenizer with BOS and EOS that adds neither."""
    return write_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer"))

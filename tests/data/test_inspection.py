import numpy as np
import pytest

from cpt_mega.data import inspection
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.manifest import load_manifest
from cpt_mega.data.preprocess import PreprocessOptions, preprocess
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS, write_bpe_tokenizer, write_corpus, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(PreprocessOptions((str(source),), str(tokenizer_folder), str(tmp_path / "c")))
    return IndexedCorpus(tmp_path / "c")


def test_a_summary_counts(corpus):
    found, lengths = inspection.summarise(corpus), corpus.document_lengths
    assert (found.documents, found.tokens, found.empty_documents) == (5, lengths.sum(), 0)
    assert found.lengths["least"] == lengths.min() and found.lengths["mean"] == lengths.mean()
    assert found.manifest["documents"] == 5


def test_a_corpus_without_documents(tmp_path):
    found = inspection.summarise(write_corpus(tmp_path / "none", []))
    assert (found.documents, found.tokens, found.lengths, found.manifest) == (0, 0, {}, None)


def test_documents_are_text_by_their_own_tokenizer(tmp_path, corpus, tokenizer_folder):
    tokenizer = inspection.load_own_tokenizer(corpus, str(tokenizer_folder))
    assert [tokenizer.decode(inspection.document_ids(corpus, i)) for i in range(5)] == [f"{t}<|eos|>" for t in TEXTS]
    with pytest.raises(InputError, match="--document = 5"):
        inspection.document_ids(corpus, 5)
    other = write_bpe_tokenizer(tmp_path / "other", bos=False)
    with pytest.raises(InputError, match="--tokenizer"):
        inspection.load_own_tokenizer(corpus, str(other))


def test_an_intact_corpus_has_no_problems(corpus):
    calls = []
    assert inspection.find_problems(corpus, lambda done, total: calls.append((done, total))) == []
    assert calls[-1][0] == calls[-1][1] > 0


def test_every_kind_of_damage_is_said(tmp_path, corpus):
    tokens = np.memmap(tmp_path / "c.bin", corpus.dtype, "r+")
    tokens[0], tokens[-1] = 60_000, 7
    tokens.flush()
    (tmp_path / "in.jsonl").write_text("{}\n")
    problems = inspection.find_problems(IndexedCorpus(tmp_path / "c"))
    said = (
        "documents 0 to 4 are not those of the manifest",
        "1 token ids lie outside",
        "1 of 5 documents do not end in EOS 1 (the first is document 4)",
        "has changed",
    )
    assert len(problems) == 4
    for words, problem in zip(said, problems, strict=True):
        assert words in problem


def test_the_manifest_made_for_foreign_files_is_the_one_that_preprocessing_wrote(tmp_path, corpus, tokenizer_folder):
    tokenizer, written = TextTokenizer.load(tokenizer_folder), load_manifest(corpus.prefix)
    made = inspection.make_manifest(corpus, tokenizer)
    names = ("tokenizer_digest", "vocab_size", "eos_id", "bos_id", "dtype", "documents", "tokens", "content_digest")
    assert [getattr(made, name) for name in names] == [getattr(written, name) for name in names]


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([[5, 1], [5]], "do not end in EOS 1"),
        ([[5, 1], []], "do not end in EOS"),
        ([[9999, 1]], "outside the vocabulary"),
    ],
)
def test_no_manifest_is_made_for_another_tokenizers_files(tmp_path, tokenizer_folder, documents, words):
    corpus = write_corpus(tmp_path / "foreign", documents)
    with pytest.raises(InputError, match=words):
        inspection.make_manifest(corpus, TextTokenizer.load(tokenizer_folder))


def test_bos_is_said_when_every_document_begins_with_it(tmp_path, tokenizer_folder):
    tokenizer = TextTokenizer.load(tokenizer_folder)
    assert inspection.make_manifest(write_corpus(tmp_path / "a", [[0, 5, 1], [0, 1]]), tokenizer).bos_id == 0
    assert inspection.make_manifest(write_corpus(tmp_path / "b", [[0, 5, 1], [5, 1]]), tokenizer).bos_id is None


def test_what_stands_beside_a_corpus_is_missed(tmp_path, tokenizer_folder):
    for name, content in (("a.py", "a = 1"), ("b.py", "")):
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / name).write_text(content)
    preprocess(PreprocessOptions((str(tmp_path / "code"),), str(tokenizer_folder), str(tmp_path / "c")))
    assert inspection.find_problems(IndexedCorpus(tmp_path / "c")) == []
    for name in ("c.rejects.jsonl", "c.documents.jsonl"):
        (tmp_path / name).unlink()
    expected = [f"{tmp_path / name} is missing" for name in ("c.rejects.jsonl", "c.documents.jsonl")]
    assert inspection.find_problems(IndexedCorpus(tmp_path / "c")) == expected

import json

import pytest

from cpt_mega.data.indexed import IndexedCorpus, shard_prefixes, shards_path
from cpt_mega.data.manifest import load_manifest, manifest_path
from cpt_mega.data.preprocess import PreprocessOptions, preprocess
from cpt_mega.data.shards import merge_shards, shard_prefix
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS, write_corpus, write_jsonl


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    """``make(index, shards, **options)``: a shard of a small file, most of them without documents."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)

    def one(index, shards=3, **options):
        options = {"inputs": (str(source),)} | options
        preprocess(
            PreprocessOptions(
                tokenizer=str(tokenizer_folder), output=str(tmp_path / "c"), shard=(index, shards), **options
            )
        )

    return one


def test_shards_without_documents_are_shards_too(tmp_path, make):
    for index in range(3):
        make(index)
    manifest, corpus = merge_shards(str(tmp_path / "c")), IndexedCorpus(tmp_path / "c")
    assert manifest.documents == corpus.documents == 5 and manifest == load_manifest(tmp_path / "c")
    assert manifest.shard is None and len(corpus.shards) == 3
    assert merge_shards(str(tmp_path / "c")) == manifest  # again


def test_a_missing_shard_is_named(tmp_path, make):
    make(0), make(2)
    with pytest.raises(InputError, match="1 of 3 shards are not complete: 1; run them"):
        merge_shards(str(tmp_path / "c"))
    with pytest.raises(InputError, match="no shard of it is complete"):
        merge_shards(str(tmp_path / "d"))


def test_shards_of_two_runs_are_told_apart(tmp_path, make):
    for index in range(3):
        make(index)
    make(0, 2)
    with pytest.raises(InputError, match="of-00002.* and .*of-00003.* lie there"):
        merge_shards(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bos": "always"}, "bos_id"), ({"inputs": ("other.jsonl",)}, "sources"), ({"grown": True}, "sources")],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path, make, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "other.jsonl", TEXTS)
    make(0), make(1)
    if change.pop("grown", False):
        write_jsonl(tmp_path / "in.jsonl", TEXTS * 2)
    make(2, **change)
    with pytest.raises(InputError, match=f"shard-00002-of-00003 {message}"):
        merge_shards(str(tmp_path / "c"))
    assert not shards_path(tmp_path / "c").exists()


def test_rejects_are_weighed_over_all_shards(tmp_path, make):
    write_jsonl(tmp_path / "in.jsonl", [*TEXTS, b"{broken"])
    for index in range(3):
        make(index)
    with pytest.raises(InputError, match="1 of 6 documents were rejected"):
        merge_shards(str(tmp_path / "c"))
    assert merge_shards(str(tmp_path / "c"), max_reject_share=0.2).rejects == 1


def test_what_stands_there_is_not_hidden(tmp_path, make):
    make(0, 1)
    write_corpus(tmp_path / "c", [[1]])
    with pytest.raises(InputError, match="a corpus of its own stands there"):
        merge_shards(str(tmp_path / "c"))


def test_a_corpus_that_is_no_shard_is_refused(tmp_path, make):
    make(0, 1)
    path = manifest_path(shard_prefix(str(tmp_path / "c"), 0, 1))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard": None}))
    with pytest.raises(InputError, match="--shard"):
        merge_shards(str(tmp_path / "c"))


@pytest.mark.parametrize("content", ["{", "[]", "[1]", '"x"', '["a", "../b"]', '["/b"]', '[""]', "[" * 100_000])
def test_a_damaged_list_of_shards_is_named(tmp_path, content):
    shards_path(tmp_path / "c").write_text(content)
    with pytest.raises(InputError, match="c.shards.json.*merge_shards"):
        shard_prefixes(str(tmp_path / "c"))


def test_shards_of_two_kinds_make_no_corpus(tmp_path):
    write_corpus(tmp_path / "a", [[1]], "int32"), write_corpus(tmp_path / "b", [[1]], "uint16")
    shards_path(tmp_path / "c").write_text('["a", "b"]')
    with pytest.raises(InputError, match="its dtype or its loss mask differs"):
        IndexedCorpus(tmp_path / "c")

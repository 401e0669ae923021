import json
from dataclasses import replace

import pytest

from cpt_mega.data.indexed import IndexedCorpusWriter
from cpt_mega.data.manifest import CorpusManifest, content_digest, load_manifest, manifest_path
from cpt_mega.errors import InputError
from tests.helpers.corpora import write_corpus

MANIFEST = CorpusManifest(
    tokenizer_digest="t",
    vocab_size=10,
    eos_id=1,
    bos_id=None,
    dtype="int32",
    documents=2,
    tokens=3,
    content_digest="c",
    sources=[{"path": "a", "bytes": 1, "sha256": "s"}],
    tool_version="0",
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "c", [[1, 2], [3]])


def test_round_trip(corpus):
    MANIFEST.write(corpus.prefix)
    assert load_manifest(corpus.prefix) == MANIFEST
    MANIFEST.check_against(corpus)


def test_a_corpus_without_a_manifest_is_accepted(corpus):
    assert load_manifest(corpus.prefix) is None


@pytest.mark.parametrize("change", [{"documents": 3}, {"tokens": 4}, {"dtype": "uint16"}])
def test_counts_of_another_corpus_are_refused(corpus, change):
    with pytest.raises(InputError, match=next(iter(change))):
        replace(MANIFEST, **change).check_against(corpus)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_damage_is_refused(corpus, content):
    manifest_path(corpus.prefix).write_text(content)
    with pytest.raises(InputError, match="manifest"):
        load_manifest(corpus.prefix)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", "3"), ("tokens", None), ("tokens", True), ("bos_id", "x"), ("sources", {}), ("unheard_of", 1)],
)
def test_a_wrong_field_is_named(corpus, name, value):
    MANIFEST.write(corpus.prefix)
    path = manifest_path(corpus.prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=name):
        load_manifest(corpus.prefix)


def test_a_missing_field_is_named_unless_it_has_a_default(corpus):
    MANIFEST.write(corpus.prefix)
    path = manifest_path(corpus.prefix)
    values = json.loads(path.read_text())
    del values["token_bytes"]
    path.write_text(json.dumps(values))
    assert load_manifest(corpus.prefix) == MANIFEST
    del values["eos_id"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="eos_id"):
        load_manifest(corpus.prefix)


def test_the_writer_knows_the_digest_of_its_files(tmp_path):
    with IndexedCorpusWriter(tmp_path / "c", "int32") as writer:
        writer.add([1, 2, 3])
    assert writer.content_digest == content_digest(tmp_path / "c")

import json
from dataclasses import replace

import pytest

from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.manifest import CorpusManifest, damaged_parts, load_manifest, manifest_path, parts_digest
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
    parts=[{"documents": 2, "tokens": 3, "sha256": "c" * 64, "source": 0, "source_bytes": 1, "source_sha256": "s"}],
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
    [
        ("tokens", "3"),
        ("tokens", None),
        ("tokens", True),
        ("bos_id", "x"),
        ("sources", {}),
        ("shard", 1),
        ("unheard_of", 1),
    ],
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


def test_a_mask_that_is_missing_or_too_many_is_refused(corpus):
    with pytest.raises(InputError, match="loss_mask = 'assistant': .*mask.bin is missing"):
        replace(MANIFEST, loss_mask="assistant").check_against(corpus)
    mask_path(corpus.prefix).write_bytes(bytes(3))
    with pytest.raises(InputError, match="loss_mask = 'all': .*mask.bin is there"):
        MANIFEST.check_against(IndexedCorpus(corpus.prefix))


def test_damage_is_found_in_its_part(corpus):
    parts = [{"documents": 1, "tokens": size, "sha256": corpus.digest_part(i, 1)} for i, size in enumerate((2, 1))]
    manifest, seen = replace(MANIFEST, parts=parts, content_digest=parts_digest(parts)), []
    assert damaged_parts(corpus, manifest, lambda done, total: seen.append((done, total))) == []
    assert seen == [(2, 3), (3, 3)]
    changed = write_corpus(corpus.prefix + "2", [[1, 2], [4]])
    assert damaged_parts(changed, manifest) == ["documents 1 to 1 are not those of the manifest"]
    assert damaged_parts(corpus, replace(manifest, content_digest="0")) == [
        "the content digest is not that of the parts"
    ]

"""Corpora whose index, manifest, list of shards or kept plan is damaged or lies: read as they are, or refused in one line."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from cpt_mega.data import plan_store
from cpt_mega.data.indexed import IndexedCorpus, plans_path, shards_path
from cpt_mega.data.inspection import find_problems
from cpt_mega.data.manifest import CorpusManifest, load_manifest, manifest_path, parts_digest
from cpt_mega.data.mixture import Mixture
from cpt_mega.data.packing import plan_rows
from cpt_mega.data.plan_store import open_plan
from cpt_mega.data.stream_state import SourceState, StreamState
from cpt_mega.errors import InputError
from tests.helpers.corpora import write_corpus
from tests.helpers.mutations import damaged_bytes, damaged_json, damaged_values, overwrite

DOCUMENTS = [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 9]]
CI = settings(max_examples=150, deadline=None, derandomize=True, database=None)
LONG = settings(CI, max_examples=10_000)


def make_corpus(prefix):
    corpus = write_corpus(prefix, DOCUMENTS, np.uint16)
    source = {"source": 0, "source_bytes": 9, "source_sha256": "d" * 64, "rejects": 0}
    parts = [
        {"documents": count, "tokens": tokens, "sha256": corpus.digest_part(first, count), **source}
        for first, count, tokens in ((0, 1, 4), (1, 2, 7))
    ]
    sources = [{"path": "/gone.jsonl", "bytes": 18, "sha256": "e" * 64, "field": "text"}]
    named = {"tokenizer_digest": "t" * 64, "vocab_size": 10, "eos_id": 9, "bos_id": None, "tool_version": "1"}
    counts = {"dtype": "uint16", "documents": 3, "tokens": 11, "content_digest": parts_digest(parts)}
    CorpusManifest(**named, **counts, parts=parts, sources=sources).write(prefix)
    return prefix


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("hostile") / "c")


@pytest.fixture(scope="module")
def good(prefix):
    """What the files hold, by suffix."""
    return {suffix: prefix.with_name(f"c{suffix}").read_bytes() for suffix in (".idx", ".bin", ".manifest.json")}


def read_all(prefix):
    """Everything that an index says, which must go together."""
    corpus = IndexedCorpus(prefix)
    lengths = corpus.document_lengths
    assert lengths.sum() == corpus.tokens and len(lengths) == corpus.documents
    for document, length in enumerate(lengths.tolist()):
        assert len(corpus.read(document, 0, length)) == length == corpus.length_of(document)
    assert sum(map(len, corpus.blocks())) == corpus.tokens and len(corpus.ends[0]) == corpus.documents


def refused_or_read(path, content, read):
    overwrite(path, content)
    try:
        read()
    except InputError as error:
        assert str(path.with_suffix("").with_suffix("")) in str(error) and "\n" not in str(error)


def small_index():
    """Made here, as hypothesis takes no fixtures for its strategies."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder) / "c")
        return Path(folder, "c.idx").read_bytes(), Path(folder, "c.manifest.json").read_bytes()


INDEX, MANIFEST = small_index()


def test_what_is_damaged_below_is_good(prefix, good):
    read_all(prefix)
    assert find_problems(IndexedCorpus(prefix)) == [] and (good[".idx"], good[".manifest.json"]) == (INDEX, MANIFEST)


@CI
@given(content=damaged_bytes(INDEX))
def test_a_damaged_index_is_refused_or_consistent(prefix, good, content):
    refused_or_read(prefix.with_name("c.idx"), content, lambda: read_all(prefix))


@pytest.mark.full
@LONG
@given(content=damaged_bytes(INDEX))
def test_many_damaged_indexes(prefix, good, content):
    refused_or_read(prefix.with_name("c.idx"), content, lambda: read_all(prefix))


@CI
@given(content=damaged_json(MANIFEST))
def test_a_damaged_manifest_is_refused_or_its_problems_told(prefix, good, content):
    overwrite(prefix.with_name("c.idx"), INDEX)
    refused_or_read(manifest_path(prefix), content, lambda: find_problems(IndexedCorpus(prefix)))


@pytest.mark.full
@LONG
@given(content=damaged_json(MANIFEST))
def test_many_damaged_manifests(prefix, good, content):
    overwrite(prefix.with_name("c.idx"), INDEX)
    refused_or_read(manifest_path(prefix), content, lambda: find_problems(IndexedCorpus(prefix)))


@settings(CI, max_examples=60)
@given(content=damaged_json(b'["c", "c"]'))
def test_a_damaged_list_of_shards_is_refused_or_read(prefix, good, content):
    overwrite(prefix.with_name("c.idx"), INDEX)
    path = shards_path(prefix.with_name("many"))
    overwrite(path, content)
    try:
        read_all(prefix.with_name("many"))
    except InputError as error:
        assert str(prefix.parent) in str(error)


@pytest.mark.parametrize("count", [2**20, 2**40, 2**61 - 7, 2**64 - 1])
@pytest.mark.parametrize("place", [18, 26])  # sequences, document indices
def test_a_count_that_lies_takes_no_memory(tmp_path, place, count):
    prefix = make_corpus(tmp_path / "c")
    (tmp_path / "c.idx").write_bytes(INDEX[:place] + count.to_bytes(8, "little") + INDEX[place + 8 :])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"c\.idx"):
            IndexedCorpus(prefix)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


LIES = {
    "parts that do not add up": ("parts", 0, "documents", 2),
    "a part of no source": ("parts", 0, "source", 1),
    "a digest that is none": ("parts", 0, "sha256", "x"),
    "a negative count": ("parts", 0, "tokens", -4),
    "a source without a path": ("sources", 0, "path", None),
    "more that counts than there is": ("counted_tokens", 12),
    "true for a number": ("vocab_size", True),
    "a mask that there is not": ("loss_mask", "some"),
    "a shard that there is not": ("shard", {"index": 2, "shards": 2, "plan": "p"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, lie):
    prefix = make_corpus(tmp_path / "c")
    values = json.loads(MANIFEST)
    *place, last, new = LIES[lie]
    at = values
    for key in place:
        at = at[key]
    at[last] = new
    manifest_path(prefix).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"c\.manifest\.json"):
        load_manifest(prefix)


ALONE = Mixture.fixed({"a": 1.0})
STATE = StreamState({"a": SourceState(3, 40, 10, 1.5)}, ALONE, ALONE, 10, {"a": [2, 5]}, ["b"])


@CI
@given(value=damaged_values(STATE.to_json()))
def test_a_damaged_data_state_is_refused_or_can_be_gone_on_from(value):
    try:
        state = StreamState.from_json(value)
    except InputError as error:
        assert "data state" in str(error)
    else:
        assert StreamState.from_json(state.to_json()) == state  # NaN would not equal itself


@settings(CI, max_examples=100)
@given(damage=damaged_bytes(bytes(range(256)) * 8))
def test_a_kept_plan_that_is_damaged_is_made_anew(tmp_path_factory, damage):
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_store, "KEPT_FROM_DOCUMENTS", 1)
        corpus = write_corpus(folder / "c", DOCUMENTS, np.uint16)
        open_plan(corpus, 8, "best_fit")
        (path,) = plans_path(folder / "c").glob("best_fit.8.*")
        content = path.read_bytes()
        place = damage[0] * len(content) // 256 if damage else 0
        overwrite(path, content[:place] + damage[: len(damage) % 9] + content[place + len(damage) % 9 :])
        found, expected = open_plan(corpus, 8, "best_fit"), plan_rows(corpus.document_lengths, 8, "best_fit")
        assert found.seq_length == expected.seq_length and found.rows == expected.rows
        assert [found.pieces(row) for row in range(found.rows)] == [expected.pieces(row) for row in range(found.rows)]

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.row_checks import RowChecks, longest_run, periodic_share
from cpt_mega.data.stream import EndOfData, MixedStream, Repetition
from cpt_mega.data.stream_state import StreamState
from cpt_mega.errors import InputError
from tests.helpers.corpora import make_source, write_corpus

S = 64
CHECKS = {"max_run": 20, "max_periodic_share": 0.6, "min_unique_share": 0.1}
IDS = st.lists(st.integers(0, 3), max_size=40).map(lambda ids: np.array(ids, np.int64))


@given(IDS)
def test_the_longest_run(ids):
    best = now = 0
    for index, token in enumerate(ids):
        now = now + 1 if index and token == ids[index - 1] else 1
        best = max(best, now)
    assert longest_run(ids) == best


@given(IDS)
def test_the_best_period(ids):
    shares = [sum(ids[p:] == ids[:-p]) / len(ids) for p in range(1, len(ids) // 2 + 1)]
    assert periodic_share(ids)[0] == pytest.approx(max(shares, default=0))


def odd_and_even_documents():
    """Rows of one document each; every third is odd, each for another reason."""
    draw, documents = np.random.default_rng(0), []
    odd = [[5] * 30 + list(range(100, 134)), [1, 2, 3, 4, 5, 6, 7, 8] * 8, draw.integers(0, 3, S).tolist()]
    for number in range(30):
        documents.append(odd[number // 3 % 3] if number % 3 == 0 else draw.integers(10, 1000, S).tolist())
    return documents


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(write_corpus(tmp_path_factory.mktemp("odd") / "c", odd_and_even_documents()), "a", 1, S)


def stream_with(source, action, state=None):
    return MixedStream([source], S, seed=0, state=state, checks=RowChecks(action, **CHECKS))


def documents_of(stream, refs):
    return [stream.sources[0].plan.pieces(ref.row)[0][0] for ref in refs]


def test_each_kind_of_oddness_is_named(source):
    stream = stream_with(source, "log")
    refs = stream.next_batch(30)
    hits = {hit.documents[0]: hit.problem for hit in stream.take_hits()}
    assert sorted(hits) == list(range(0, 30, 3)) and stream.take_hits() == []
    assert hits[0] == "the same token 30 times in a row"
    assert "repeat those 8 before" in hits[3]
    assert "different ones" in hits[6]
    assert refs == MixedStream([source], S, seed=0).next_batch(30)


def test_masked_rows_have_no_targets_and_stay_where_they_are(source):
    stream = stream_with(source, "mask")
    refs = stream.next_batch(30)
    for ref, document in zip(refs, documents_of(stream, refs), strict=True):
        assert stream.read(ref).loss_mask.any() == (document % 3 != 0)
    assert stream.state.sources["a"].tokens == 20 * S  # what is masked is in no ledger
    assert refs == MixedStream([source], S, seed=0).next_batch(30)


@given(st.integers(0, 25))
def test_the_next_row_comes_instead_of_one_that_is_skipped_wherever_the_run_was_cut(source, cut):
    plain = MixedStream([source], S, seed=0).next_batch(90)
    expected = [
        ref
        for ref, document in zip(plain, documents_of(stream_with(source, "off"), plain), strict=True)
        if document % 3
    ]
    stream = stream_with(source, "skip")
    before = stream.next_batch(cut)
    state = StreamState.from_json(json.loads(json.dumps(stream.state.to_json())))
    assert before + stream_with(source, "skip", state).next_batch(40 - cut) == expected[:40]


def test_ordinary_text_is_not_odd():
    random = np.random.default_rng(0)
    zipf = np.minimum(random.zipf(1.3, 4096), 30_000)
    assert RowChecks("log").problem(zipf) is None


@pytest.mark.parametrize(("action", "given"), [("skip", 0), ("mask", 6)])
def test_a_source_of_odd_rows_alone_is_an_error(tmp_path, action, given):
    """Its share could never be filled: the run would look for a row, or mask all that it finds, for ever."""
    source = make_source(write_corpus(tmp_path / "c", [[7] * S] * 3), "a", 1, S)
    stream = stream_with(source, action)
    stream.next_batch(given)
    with pytest.raises(InputError, match="rows one behind the other of source a = 7: nothing of this source counts"):
        stream.next_batch(1)


def test_skipping_counts_for_each_source_alone(tmp_path):
    """A source that is read out in between makes no other one odd."""
    draw = np.random.default_rng(0)
    good = draw.integers(10, 1000, (20, S)).tolist()
    sources = [
        make_source(write_corpus(tmp_path / "a", good[:2] + [[7] * S] * 12), "a", 1, S),
        make_source(write_corpus(tmp_path / "b", [*good[2:6], [7] * S]), "b", 1, S),
    ]
    for seed in range(10):
        stream = MixedStream(sources, S, seed, repetition=Repetition(1, "drop"), checks=RowChecks("skip", max_run=8))
        refs = []
        with pytest.raises(EndOfData):
            while True:
                refs += stream.next_batch(1)
        assert sorted(refs) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]

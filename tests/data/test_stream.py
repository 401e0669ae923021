import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.stream import MixedStream
from cpt_mega.data.stream_state import StreamState
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus, make_source, write_corpus

S = 16
LENGTHS = {"a": [40, 3, 7, 9, 16] * 4, "b": [5] * 11, "c": [15, 2, 1] * 9, "d": [100]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    weights = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    return [make_source(counting_corpus(folder / name, LENGTHS[name]), name, weights[name], S) for name in LENGTHS]


def rows_by_source(stream, refs):
    """The rows drawn from each source, by name, in order."""
    drawn = {source.name: [] for source in stream.sources}
    for ref in refs:
        drawn[stream.sources[ref.source_index].name].append(ref.row)
    return drawn


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_size_does_not_change_the_order(sources, batch):
    stream, whole = MixedStream(sources, S, seed=3), MixedStream(sources, S, seed=3)
    refs = [ref for _ in range(210 // batch) for ref in stream.next_batch(batch)]
    assert refs == whole.next_batch(210)
    assert stream.state == whole.state


@given(cut=st.integers(0, 120), seed=st.integers(0, 5))
def test_a_restored_state_goes_on(sources, cut, seed):
    whole = MixedStream(sources, S, seed)
    refs = whole.next_batch(150)
    first = MixedStream(sources, S, seed)
    before = first.next_batch(cut)
    saved = json.loads(json.dumps(first.state.to_json()))
    second = MixedStream(sources, S, seed, StreamState.from_json(saved))
    assert before + second.next_batch(150 - cut) == refs
    assert second.state == whole.state


def test_every_epoch_takes_each_row_once_in_its_own_order(sources):
    stream = MixedStream(sources[:1], S, seed=1)
    rows = sources[0].plan.rows
    first, second = ([ref.row for ref in stream.next_batch(rows)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(rows))
    assert first != second
    assert stream.state.sources["a"].tokens == 2 * sources[0].corpus.tokens


@given(weights=st.lists(st.floats(0.001, 1), min_size=4, max_size=4), count=st.integers(1, 4))
def test_shares_stay_within_one_row_at_every_point(sources, weights, count):
    mixture = [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)][:count]
    stream, taken = MixedStream(mixture, S, seed=0), Counter()
    for _ in range(120):
        (ref,) = stream.next_batch(1)
        taken[ref.source_index] += stream.row_tokens(ref)
        for index, weight in enumerate(stream.weights):
            assert abs(taken[index] - weight * taken.total()) < S


def test_shares_stay_within_one_row_with_many_sources(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[1] * S] * 50)
    rng = np.random.default_rng(0)
    mixture = [make_source(corpus, f"s{number}", rng.random() ** 4 + 1e-3, S) for number in range(30)]
    stream, taken = MixedStream(mixture, S, seed=0), np.zeros(30)
    for _ in range(1000):
        taken[stream.next_batch(1)[0].source_index] += S
        assert np.abs(taken - np.array(stream.weights) * taken.sum()).max() < S


@given(
    schedule=st.lists(st.tuples(st.integers(0, 40), st.lists(st.floats(0.01, 1), min_size=4, max_size=4)), max_size=5)
)
def test_changed_weights_neither_repeat_nor_skip_a_row(sources, schedule):
    state, drawn = None, {name: [] for name in LENGTHS}
    for rows, weights in schedule:
        mixture = [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]
        stream = MixedStream(mixture, S, seed=0, state=state)
        for name, more in rows_by_source(stream, stream.next_batch(rows)).items():
            drawn[name] += more
        state = stream.state
    for source in sources:
        alone = MixedStream([source], S, seed=0).next_batch(len(drawn[source.name]))
        assert drawn[source.name] == [ref.row for ref in alone]


def test_shares_follow_changed_weights_at_once(sources):
    stream = MixedStream([replace(source, weight=1) for source in sources[:2]], S, seed=0)
    stream.next_batch(400)
    changed = MixedStream(
        [replace(source, weight=w) for source, w in zip(sources, (9, 1), strict=False)], S, 0, stream.state
    )
    counts = Counter(ref.source_index for ref in changed.next_batch(100))
    assert 5 <= counts[1] <= 15


def test_sources_may_go_and_come_back(sources):
    both = MixedStream(sources[:2], S, seed=0)
    refs = rows_by_source(both, both.next_batch(20))
    without = MixedStream(sources[1:3], S, seed=0, state=both.state)
    without.next_batch(20)
    assert without.state.sources["a"].rows_taken == both.state.sources["a"].rows_taken
    assert without.state.sources["c"].rows_taken > 0
    again = MixedStream(sources[:1], S, seed=0, state=without.state)
    alone = MixedStream(sources[:1], S, seed=0).next_batch(len(refs["a"]) + 5)
    assert again.next_batch(5) == alone[-5:]


def test_seeds_and_names_give_different_orders(sources):
    rows = sources[0].plan.rows
    orders = [MixedStream(sources[:1], S, seed).next_batch(rows) for seed in (0, 1)]
    orders.append(MixedStream([replace(sources[0], name="other")], S, 0).next_batch(rows))
    assert len({tuple(order) for order in orders}) == 3


def test_a_given_state_is_not_changed(sources):
    state = StreamState()
    MixedStream(sources, S, 0, state).next_batch(5)
    assert state == StreamState()


def test_reading_a_row(sources):
    stream = MixedStream(sources, S, seed=0)
    for ref in stream.next_batch(50):
        row = stream.read(ref)
        assert sum(row.doc_lengths) == S
        assert stream.row_tokens(ref) == sources[ref.source_index].plan.row_tokens[ref.row]


def test_reading_checks_the_vocabulary(sources):
    stream = MixedStream([replace(sources[0], vocab_size=10)], S, seed=0)
    with pytest.raises(InputError, match="vocabulary of 10"):
        for ref in stream.next_batch(sources[0].plan.rows):
            stream.read(ref)


def test_bad_mixtures_are_refused(sources):
    for mixture in ([], sources[:1] * 2, [replace(sources[0], weight=0)]):
        with pytest.raises(InputError, match="data.sources"):
            MixedStream(mixture, S, seed=0)

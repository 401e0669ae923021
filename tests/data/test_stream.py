import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.adaptive import adapted_weights
from cpt_mega.data.mixture import Mixture
from cpt_mega.data.stream import EndOfData, MixedStream, Repetition
from cpt_mega.data.stream_state import StreamState
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus, make_source, masked_corpus, write_corpus

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
        for index, weight in enumerate(stream.shares.values()):
            assert abs(taken[index] - weight * taken.total()) < S


@given(st.lists(st.integers(0, 3), min_size=100, max_size=100), st.integers(0, 100))
def test_what_a_loss_mask_leaves_out_is_in_no_ledger_and_no_share(sources, tmp_path_factory, counts, cut):
    counts = [1, *(int(count == 0) for count in counts[1:])]
    masked = make_source(masked_corpus(tmp_path_factory.mktemp("m") / "m", [7] * 14 + [2], counts), "m", 0.5, S)
    stream, counted = MixedStream([sources[0], masked], S, seed=0), Counter()
    for number in range(120):
        if number == cut:
            state = StreamState.from_json(json.loads(json.dumps(stream.state.to_json())))
            stream = MixedStream([sources[0], masked], S, seed=0, state=state)
        (ref,) = stream.next_batch(1)
        pieces = stream.sources[ref.source_index].plan.pieces(ref.row)
        flags = [counts[7 * document + start :][:length] for document, start, length in pieces]
        counted[ref.source_index] += sum(map(sum, flags)) if ref.source_index else stream.row_tokens(ref)
        assert all(abs(counted[index] - counted.total() / 2) < S for index in (0, 1))
    assert [source.tokens for source in stream.state.sources.values()] == [counted[0], counted[1]]
    assert stream.tokens == counted.total()


def test_a_source_of_which_nothing_counts_ends_the_run_instead_of_feeding_it_for_ever(sources, tmp_path):
    nothing = make_source(masked_corpus(tmp_path / "m", [7] * 10, [0] * 70), "m", 0.5, S)
    stream = MixedStream([sources[0], nothing], S, seed=0)
    with pytest.raises(InputError, match="of source m = 11: nothing of this source counts"):
        stream.next_batch(1000)


def test_one_token_that_counts_is_enough(tmp_path):
    """However far its rows are apart in two epochs."""
    source = make_source(masked_corpus(tmp_path / "m", [S] * 9, [1] + [0] * (9 * S - 1)), "m", 1, S)
    for seed in range(20):
        stream = MixedStream([source], S, seed)
        assert len({ref.row for ref in stream.next_batch(20)}) == 1  # the others would be computed for nothing
        assert stream.tokens == 20
        state = stream.state
        for _ in range(20):
            stream.next_batch(1)
            stream.go_on_from(state)


def test_shares_stay_within_one_row_with_many_sources(tmp_path):
    corpus = write_corpus(tmp_path / "c", [[1] * S] * 50)
    rng = np.random.default_rng(0)
    mixture = [make_source(corpus, f"s{number}", rng.random() ** 4 + 1e-3, S) for number in range(30)]
    stream, taken = MixedStream(mixture, S, seed=0), np.zeros(30)
    for _ in range(1000):
        taken[stream.next_batch(1)[0].source_index] += S
        assert np.abs(taken - np.array(list(stream.shares.values())) * taken.sum()).max() < S


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


CURRICULA = st.lists(
    st.tuples(st.integers(1, 600), st.lists(st.floats(0.02, 1), min_size=4, max_size=4)), min_size=1, max_size=4
)


def curriculum(sources, steps):
    at, points = 0, []
    for length, weights in steps:
        at += length
        points.append((at, {source.name: weight for source, weight in zip(sources, weights, strict=True)}))
    return Mixture.of(points)


@given(CURRICULA)
def test_a_curriculum_is_followed_within_one_row_at_every_point(sources, steps):
    mixture = curriculum(sources, steps)
    stream, taken, total = MixedStream(sources, S, seed=0, mixture=mixture), Counter(), 0
    for _ in range(150):
        (ref,) = stream.next_batch(1)
        tokens = stream.row_tokens(ref)
        taken[ref.source_index], total = taken[ref.source_index] + tokens, total + tokens
        for index in range(len(sources)):
            assert abs(taken[index] - mixture.entitled(index, 0, total)) <= S + 1e-6  # a whole row where shares jump


@given(CURRICULA, st.integers(0, 100))
def test_a_curriculum_goes_on_from_any_place_and_repeats_or_skips_nothing(sources, steps, cut):
    mixture = curriculum(sources, steps)
    whole = MixedStream(sources, S, seed=1, mixture=mixture)
    refs = whole.next_batch(140)
    first = MixedStream(sources, S, seed=1, mixture=mixture)
    before = first.next_batch(cut)
    second = MixedStream(
        sources, S, seed=1, mixture=mixture, state=StreamState.from_json(json.loads(json.dumps(first.state.to_json())))
    )
    assert before + second.next_batch(140 - cut) == refs
    for name, rows in rows_by_source(whole, refs).items():
        alone = [source for source in sources if source.name == name]
        assert rows == [ref.row for ref in MixedStream(alone, S, seed=1).next_batch(len(rows))]


def test_a_source_that_is_added_to_a_run_starts_at_its_beginning_and_moves_no_other(sources):
    two = MixedStream(sources[:2], S, seed=0)
    before = rows_by_source(two, two.next_batch(31))
    three = MixedStream(sources[:3], S, seed=0, state=two.state)
    after = rows_by_source(three, three.next_batch(60))
    for source in sources[:3]:
        alone = MixedStream([source], S, seed=0)
        rows = before.get(source.name, []) + after[source.name]
        assert rows and rows == [ref.row for ref in alone.next_batch(len(rows))]


def test_a_decision_during_the_run_holds_through_a_restart_and_until_the_user_asks_for_another(sources):
    stream = MixedStream(sources[:2], S, seed=0)
    stream.next_batch(20)
    stream.reweight({"a": 1, "b": 9})
    assert stream.shares == pytest.approx({"a": 0.1, "b": 0.9})
    again = MixedStream(sources[:2], S, seed=0, state=stream.state)
    refs = stream.next_batch(100)
    assert again.next_batch(100) == refs
    tokens = [sum(stream.row_tokens(ref) for ref in refs if ref.source_index == index) for index in (0, 1)]
    assert tokens[1] / sum(tokens) == pytest.approx(0.9, abs=S / sum(tokens))
    asked = [replace(sources[0], weight=0.9), replace(sources[1], weight=0.1)]
    assert MixedStream(asked, S, seed=0, state=stream.state).shares == pytest.approx({"a": 0.9, "b": 0.1})


@pytest.mark.parametrize("every", [1, 4, 10, 64])
def test_deciding_the_same_again_and_again_changes_no_share(sources, every):
    """A source with a small share is due rarely, and is not forgotten whenever something is decided."""
    weights = {"a": 0.8, "b": 0.15, "c": 0.04, "d": 0.01}
    mixture = [replace(source, weight=weights[source.name]) for source in sources]
    stream, taken = MixedStream(mixture, S, seed=0), Counter()
    for number in range(3000):
        if number % every == 0:
            stream.reweight(weights)
        (ref,) = stream.next_batch(1)
        taken[ref.source_index] += stream.row_tokens(ref)
        for index, weight in enumerate(weights.values()):
            assert abs(taken[index] - weight * taken.total()) < 2 * S
    assert all(taken[index] for index in range(4))


@given(
    schedule=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.floats(0.02, 1), min_size=4, max_size=4)), min_size=1, max_size=12
    )
)
def test_what_is_asked_for_in_all_is_given_within_two_rows_through_any_changes(sources, schedule):
    stream, taken, asked = MixedStream(sources, S, seed=0), Counter(), Counter()
    for rows, weights in schedule:
        stream.reweight(dict(zip(LENGTHS, weights, strict=True)))
        for _ in range(rows):
            (ref,) = stream.next_batch(1)
            tokens = stream.row_tokens(ref)
            taken[ref.source_index] += tokens
            for index, weight in enumerate(weights):
                asked[index] += tokens * weight / sum(weights)
                assert abs(taken[index] - asked[index]) < 2 * S


def test_a_share_may_be_taken_away_altogether(sources):
    stream = MixedStream(sources[:2], S, seed=0)
    stream.reweight({"a": 1, "b": 0})
    assert {ref.source_index for ref in stream.next_batch(30)} == {0}
    assert stream.shares == {"a": 1.0}
    for weights, message in (
        ({"a": 1}, "weights = 'b'"),
        ({"a": 1, "b": 1, "x": 1}, "weights = 'x'"),
        ({"a": 1, "b": -1}, "weights b = -1"),
        ({"a": 0, "b": 0}, "no source has a share"),
    ):
        with pytest.raises(InputError, match=message):
            stream.reweight(weights)
    assert stream.shares == {"a": 1.0}


def test_what_is_decided_brings_no_source_back_that_was_read_out(sources):
    def opened(most, state=None):
        return MixedStream(sources[:3], S, 0, state, repetition=Repetition(most, "drop"))

    stream = opened(1)
    while not stream.dropped:
        stream.next_batch(1)
    (gone,) = stream.dropped
    left = [name for name in "abc" if name != gone]
    assert stream.asked_shares(stream.tokens).keys() == set(left)
    stream.reweight({"a": 0.4, "b": 0.3, "c": 0.3})
    assert stream.shares.keys() == set(left) and stream.dropped == (gone,)
    stream.next_batch(3)
    assert stream.dropped[0] == gone and len(set(stream.dropped)) == len(stream.dropped)
    assert gone in opened(5, stream.state).shares  # it may be read more often now
    with pytest.raises(InputError, match="no source has a share"):
        stream.reweight({name: float(name == gone) for name in "abc"})


def test_weights_that_follow_the_losses_keep_what_replay_was_raised_by(sources):
    roles = dict(zip("abcd", ("domain", "domain", "replay", "replay"), strict=True))
    stream = MixedStream([replace(source, weight=0.25, role=roles[source.name]) for source in sources], S, seed=0)
    stream.next_batch(10)
    for raised, replay in ((0.2, 0.7), (0.3, 0.8)):  # one raise is not on top of another
        stream.raise_replay(raised)
        asked = stream.asked_shares(stream.tokens)
        stream.reweight(adapted_weights(asked, roles, {"a": 1.0, "b": 2.0, "c": 1.0, "d": 3.0}, 1.0, 2.0))
        assert stream.shares["c"] + stream.shares["d"] == pytest.approx(replay)
        assert stream.shares["d"] > stream.shares["c"] and stream.shares["b"] > stream.shares["a"]


def test_going_back_draws_the_same_again(sources):
    stream = MixedStream(sources, S, seed=0)
    stream.next_batch(17)
    state = stream.state
    refs = stream.next_batch(30)
    stream.go_on_from(state)
    assert stream.next_batch(30) == refs


@given(st.sets(st.integers(0, 18), max_size=12), st.integers(0, 60))
def test_excluded_rows_are_stepped_past_and_no_other_row_moves(sources, excluded, cut):
    rows = sources[0].plan.rows
    excluded = {row for row in excluded if row < rows - 1}
    plain = [ref.row for ref in MixedStream(sources[:1], S, seed=0).next_batch(100)]
    stream = MixedStream(sources[:1], S, seed=0)
    before = [ref.row for ref in stream.next_batch(cut)]
    stream.exclude({"a": excluded})
    stream = MixedStream(sources[:1], S, seed=0, state=StreamState.from_json(stream.state.to_json()))
    after = [ref.row for ref in stream.next_batch(20)]
    expected = [row for row in plain[cut:] if row not in excluded]
    assert before == plain[:cut] and after[: len(expected)] == expected[: len(after)]


def test_excluding_from_one_source_leaves_the_order_of_the_others(sources):
    plain, stepping = (MixedStream(sources[:2], S, seed=0) for _ in range(2))
    stepping.exclude({"a": [0, 1, 2]})
    b = [rows_by_source(stream, stream.next_batch(40))["b"] for stream in (plain, stepping)]
    assert b[0][:15] == b[1][:15]


def test_what_cannot_be_excluded_is_said(sources):
    stream, rows = MixedStream(sources[:1], S, seed=0), sources[0].plan.rows
    for excluded, message in (
        ({"x": [1]}, "excluded source = 'x'"),
        ({"a": [rows]}, f"excluded row of a = {rows}.*rows 0 to {rows - 1}"),
        ({"a": range(rows)}, "excluded rows of a = 'all [0-9]+': nothing is left"),
    ):
        with pytest.raises(InputError, match=message):
            stream.exclude(excluded)


def test_a_source_that_is_read_out_ends_the_run(sources):
    stream = MixedStream(sources[:2], S, seed=0, repetition=Repetition(2))
    drawn = Counter()
    with pytest.raises(EndOfData, match="source [ab] has been read 2 times"):
        for _ in range(1000):
            drawn[stream.next_batch(1)[0].source_index] += 1
    most = [2 * source.plan.rows for source in sources[:2]]
    assert any(drawn[index] == most[index] for index in (0, 1)) and all(drawn[i] <= most[i] for i in (0, 1))
    assert max(stream.epochs.values()) == 2


def test_a_source_that_is_read_out_leaves_its_share_to_the_others(sources):
    options = {"repetition": Repetition(1.5, "drop")}
    stream = MixedStream(sources, S, seed=0, **options)
    refs = []
    with pytest.raises(EndOfData, match="no other is left"):
        while True:
            refs += stream.next_batch(1)
    for index, source in enumerate(sources):
        rows = [ref.row for ref in refs if ref.source_index == index]
        alone = MixedStream([source], S, seed=0).next_batch(len(rows))
        assert len(rows) == int(1.5 * source.plan.rows) and rows == [ref.row for ref in alone]
    again = MixedStream(sources, S, seed=0, **options)
    first = again.next_batch(len(refs) // 2)
    restored = MixedStream(sources, S, seed=0, state=StreamState.from_json(again.state.to_json()), **options)
    assert first + restored.next_batch(len(refs) - len(first)) == refs


def test_a_dropped_source_comes_back_when_it_may_be_read_more_often(sources):
    once, thrice = ({"repetition": Repetition(epochs, "drop")} for epochs in (1, 3))
    stream = MixedStream(sources[:2], S, seed=0, **once)
    stream.next_batch(sum(source.plan.rows for source in sources[:2]) - 1)
    (dropped,) = stream.state.dropped
    again = MixedStream(sources[:2], S, seed=0, state=stream.state, **thrice)
    assert again.state.dropped == [] and set(again.shares) == {"a", "b"}
    before = stream.state.sources[dropped].rows_taken
    again.next_batch(30)
    assert again.state.sources[dropped].rows_taken > before
    same = MixedStream(sources[:2], S, seed=0, state=stream.state, **once)
    assert same.state == stream.state


def test_excluded_rows_that_another_plan_has_not_are_forgotten(sources):
    state = MixedStream(sources[:1], S, seed=0).state
    state.excluded = {"a": [1, 10**6], "gone": [3]}
    assert MixedStream(sources[:1], S, seed=0, state=state).state.excluded == {"a": [1], "gone": [3]}


def test_a_row_far_out_is_found_at_once(sources):
    """No order is stored: the cursor of a run over many epochs costs what that of the first costs."""
    state = MixedStream(sources[:1], S, seed=0).state
    state.sources["a"].rows_taken = 10**15
    assert 0 <= MixedStream(sources[:1], S, seed=0, state=state).next_batch(1)[0].row < sources[0].plan.rows

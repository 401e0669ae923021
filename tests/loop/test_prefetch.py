import threading

import pytest

from cpt_mega.data.stream import MixedStream
from cpt_mega.data.stream_state import StreamState
from cpt_mega.errors import FaultError, InputError
from cpt_mega.loop import prefetch
from cpt_mega.loop.prefetch import Prefetcher
from tests.helpers.corpora import counting_corpus, make_source


class Stream:
    """As much of a stream as the prefetcher asks for when nothing is drawn."""

    state, epochs, dropped, tokens = StreamState(), {}, (), 0

    def go_on_from(self, state):
        self.went = state

    def next_batch(self, rows):
        return []

    def take_hits(self):
        return []

    def check_corpora(self):
        pass

    def row_tokens(self, ref):
        raise AssertionError("there is no row")


def prepared(count, read, work):
    return None


def test_the_batch_ahead_is_drawn_anew_from_where_the_state_says():
    stream, state = Stream(), StreamState(since=5)
    with Prefetcher(stream, prepared, 1) as batches:
        changed = batches.redraw(state.to_json(), lambda stream: None)
        assert batches.next().refs == []
    assert stream.went == state and changed == StreamState().to_json()


@pytest.mark.timeout(20)
def test_resting_after_the_end_does_not_wait_for_a_draw_that_was_cancelled():
    begun = threading.Event()
    with Prefetcher(Stream(), prepared, 1) as batches:
        batches.rest()
        batches._thread.submit(begun.wait)  # the thread is busy, so the next draw is still queued at the end
        batches.redraw(StreamState().to_json(), lambda stream: threading.Timer(0.3, begun.set).start())
    assert batches._ahead.cancelled()
    batches.rest()


def test_a_change_that_is_refused_changes_nothing_and_repeats_no_batch(tmp_path):
    source = make_source(counting_corpus(tmp_path / "c", [8] * 50), "a", 1, 8)

    def refs(changes):
        found = []
        with Prefetcher(MixedStream([source], 8, seed=0), prepared, 4) as batches:
            for _ in range(5):
                batch = batches.next()
                found.append(batch.refs)
                if changes:
                    with pytest.raises(InputError, match="weights = 'a'"):
                        batches.redraw(batch.stream_state, lambda stream: stream.reweight({"typo": 1}))
        return found

    assert refs(True) == refs(False)


def test_a_corpus_that_is_replaced_under_a_run_ends_it_at_the_next_look(tmp_path, monkeypatch):
    """Its size and all that is read of it are as before; only the file is another."""
    monkeypatch.setattr(prefetch, "LOOK_S", 0.0)
    source = make_source(counting_corpus(tmp_path / "c", [8] * 50), "a", 1, 8)
    with Prefetcher(MixedStream([source], 8, seed=0), prepared, 4) as batches:
        batches.next()
        (tmp_path / "beside").write_bytes((tmp_path / "c.bin").read_bytes())
        (tmp_path / "beside").replace(tmp_path / "c.bin")
        with pytest.raises(FaultError, match=r"c\.bin is not the file"):
            for _ in range(3):  # one was read ahead
                batches.next()

import threading

import pytest

from cpt_mega.data.stream_state import StreamState
from cpt_mega.loop.prefetch import Prefetcher


class Stream:
    """As much of a stream as the prefetcher asks for when nothing is drawn."""

    state, epochs = StreamState(), {}

    def go_on_from(self, state):
        self.went = state

    def next_batch(self, rows):
        return []

    def take_hits(self):
        return []

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

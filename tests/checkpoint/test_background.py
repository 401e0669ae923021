"""When a process is forked beside the training."""

import hashlib
import time
from threading import Event, Thread

import pytest

from cpt_mega.checkpoint import background
from cpt_mega.checkpoint.background import ForkedCall


def test_a_fork_waits_until_the_other_threads_sleep(monkeypatch):
    """What a thread holds at that moment stays locked in the child for good."""
    monkeypatch.setattr(background, "REST_S", 60.0)
    ended = []
    thread = Thread(target=lambda: ended.append(_work_outside_the_interpreter(0.3)))
    thread.start()
    call = ForkedCall(lambda: list(ended))
    assert call.outcome() == ([None], None)
    thread.join()


@pytest.mark.parametrize("rest", [0.0, 0.2])
def test_a_thread_that_never_sleeps_is_not_waited_for_without_end(monkeypatch, rest):
    monkeypatch.setattr(background, "REST_S", rest)
    stop = Event()
    thread = Thread(target=lambda: [_work_outside_the_interpreter(0.1) for _ in iter(stop.is_set, True)], daemon=True)
    thread.start()
    begin = time.monotonic()
    call = ForkedCall(lambda: "done")
    assert time.monotonic() - begin >= rest
    assert not stop.is_set() and call.outcome() == ("done", None)
    stop.set()
    thread.join()


def _work_outside_the_interpreter(seconds: float) -> None:
    end, much = time.monotonic() + seconds, bytes(1 << 22)
    while time.monotonic() < end:
        hashlib.sha256(much)

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


@pytest.mark.parametrize("between_s", [0.05, 0.6])
def test_a_process_that_does_nothing_is_ended_however_seldom_it_is_looked_at(monkeypatch, between_s):
    """Between two steps, which may be long."""
    monkeypatch.setattr(background, "STILL_S", 0.5)
    monkeypatch.setattr(background, "_LOOK_S", 0.01)
    call = ForkedCall(Event().wait)
    begin = time.monotonic()
    while call.is_running and time.monotonic() - begin < 20:
        time.sleep(between_s)
    assert call.stands_still and "did nothing for" in call.outcome()[1]


def test_one_long_pause_of_the_one_that_looks_is_not_held_against_it(monkeypatch):
    monkeypatch.setattr(background, "STILL_S", 0.5)
    monkeypatch.setattr(background, "_LOOK_S", 0.01)
    call = ForkedCall(lambda: time.sleep(1.5) or "done")
    assert call.is_running
    time.sleep(1.0)
    assert call.is_running and call.is_running
    call.stop()


def _work_outside_the_interpreter(seconds: float) -> None:
    end, much = time.monotonic() + seconds, bytes(1 << 22)
    while time.monotonic() < end:
        hashlib.sha256(much)

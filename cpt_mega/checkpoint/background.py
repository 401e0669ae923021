"""Work beside a loop of steps: in a forked process where the loop goes on, in a thread where it waits.

A forked process' memory is what the parent's was at the fork, whatever comes after. But a lock that another thread of the
parent holds at that moment stays locked there for good, and not all are known: libraries have threads of their own. One is
the interpreter's: a thread of Gloo that drops the last reference to a tensor, just after a collective, enters the interpreter,
and CPython 3.11 forked at that moment never comes out of ``os.fork`` in the child. So the fork waits until the other threads
sleep; and a process that does nothing any more is ended, and what waits for it is told. A thread has no such hazard.
"""

import gc
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Thread, get_native_id

import psutil
import torch

from cpt_mega.parent import signal_when_parent_ends

STILL_S = 60.0  # without computing, reading or writing anything
REST_S = 0.5  # waited at most for the other threads: one that polls a device may never sleep
_LOOK_S = 1.0
_KILLED = "the process that wrote it was killed"
# Sent to the whole job they are the trainer's to obey, which needs what is being written; with it the child ends too.
_OF_THE_JOB = (signal.SIGTERM, signal.SIGINT)


class ForkedCall:
    """The work done by a child process. What it returns must be picklable.

    The work must touch no GPU and no process group, and nothing may be read ahead when this is made.
    """

    def __init__(self, work: Callable[[], object]):
        context = multiprocessing.get_context("fork")
        self._answers, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, answer))
        _let_threads_rest()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)  # until the child ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        answer.close()
        self._done: tuple | None = None
        self._looked, self._still_s = time.monotonic(), 0.0
        self.stands_still = False

    @property
    def is_running(self) -> bool:
        """Whether the child is still at it; never waits. Ends one that stands still."""
        if not self._process.is_alive() or self._answers.poll():
            return False
        if time.monotonic() - self._looked > _LOOK_S:
            self._look()
        return not self.stands_still

    def outcome(self) -> tuple[object, str | None]:
        """Waits; what the work returned, and why it failed: one of the two is None."""
        while self.is_running:
            time.sleep(0.01)
        if self.stands_still and not self._answers.poll():
            self.stop()
            return None, f"the process that wrote it did nothing for {STILL_S:.0f} s"
        try:
            found = self._answers.recv()
        except (EOFError, OSError):  # before it answered, or in the middle of it
            found = (None, _KILLED)
        self._process.join()
        self._answers.close()
        return found

    def stop(self) -> None:
        """Ends the child if it is still at it."""
        self._process.kill()
        self._process.join()

    def _look(self) -> None:
        before, self._looked = self._looked, time.monotonic()
        done = _done_by(self._process.pid)
        if done is None or done != self._done:
            self._done, self._still_s = done, 0.0
        else:  # no single look tells it: this process may have been halted since the last, and the child too
            self._still_s += min(self._looked - before, 0.4 * STILL_S)
        self.stands_still = self._still_s > STILL_S


class ThreadedCall:
    """The work done by a thread of this process, for a loop that waits and changes nothing meanwhile: nothing is copied."""

    stands_still = False

    def __init__(self, work: Callable[[], object]):
        self._found: tuple[object, str | None] = (None, _KILLED)
        self._thread = Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread is still at it; never waits."""
        return self._thread.is_alive()

    def outcome(self) -> tuple[object, str | None]:
        """Waits; what the work returned, and why it failed: one of the two is None."""
        self._thread.join()
        return self._found

    def stop(self) -> None:
        """Does not wait for it; it ends with the process."""

    def _do(self, work: Callable[[], object]) -> None:
        self._found = _answered(work)


def _let_threads_rest() -> None:
    """Waits until every other thread of this process sleeps, which one that holds a lock for a moment does not."""
    end = time.monotonic() + REST_S
    time.sleep(0.001)  # and lets go of the interpreter, for which some may be waiting
    while _works_elsewhere() and time.monotonic() < end:
        time.sleep(0.001)


def _works_elsewhere() -> bool:
    """Whether another thread is running or waits for a disk."""
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        if state in "RD" and int(task.name) != get_native_id():
            return True
    return False


def _done_by(pid: int) -> tuple | None:
    """What a process has computed, read and written so far; None where it waits for a device, which may take its time."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_DISK_SLEEP:
                return None
            return tuple(process.cpu_times()[:2]), tuple(process.io_counters())
    except psutil.Error:  # it has just ended
        return None


def _work(work: Callable[[], object], answer) -> None:
    for number in _OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    signal_when_parent_ends(signal.SIGKILL)
    gc.disable()  # what it would collect is the parent's, on a GPU too
    torch.set_num_threads(1)  # the parent's pool of threads is not here
    answer.send(_answered(work))


def _answered(work: Callable[[], object]) -> tuple[object, str | None]:
    try:
        return work(), None
    except Exception as error:
        traceback.print_exc()
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]

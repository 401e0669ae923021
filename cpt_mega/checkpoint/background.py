"""Work beside the training loop, in a forked process: its memory is what the parent's was at the fork, whatever comes after.

The parent must hold no lock that the work needs: nothing may be read ahead at that moment, and no GPU is touched in the
child, nor a process group.
"""

import ctypes
import gc
import multiprocessing
import signal
import traceback
from collections.abc import Callable

import torch

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
# Sent to the whole job they are the trainer's to obey, which needs what is being written; with it the child ends too.
_OF_THE_JOB = (signal.SIGTERM, signal.SIGINT)


class ForkedCall:
    """The work done by a child process. What it returns must be picklable."""

    def __init__(self, work: Callable[[], object]):
        context = multiprocessing.get_context("fork")
        self._answers, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, answer))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)  # until the child ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        answer.close()

    @property
    def is_running(self) -> bool:
        """Whether the child is still at it; never waits."""
        return self._process.is_alive() and not self._answers.poll()

    def outcome(self) -> tuple[object, str | None]:
        """Waits; what the work returned, and why it failed: one of the two is None."""
        try:
            found = self._answers.recv()
        except (EOFError, OSError):  # before it answered, or in the middle of it
            found = (None, "the process that wrote it was killed")
        self._process.join()
        self._answers.close()
        return found

    def stop(self) -> None:
        """Ends the child if it is still at it."""
        self._process.kill()
        self._process.join()


def _work(work: Callable[[], object], answer) -> None:
    for number in _OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    gc.disable()  # what it would collect is the parent's, on a GPU too
    torch.set_num_threads(1)  # the parent's pool of threads is not here
    try:
        found = (work(), None)
    except Exception as error:
        traceback.print_exc()
        found = (None, _words(error))
    answer.send(found)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

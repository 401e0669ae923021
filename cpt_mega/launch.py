"""torchrun for the trainer: ``python -m cpt_mega.launch TORCHRUN_OPTIONS -m cpt_mega.train --config FILE ...``.

torchrun itself kills its workers 30 s after a signal, however long a save takes, has them die of one that comes while they
are still importing, keeps a second one from them, and answers 1 when they ended well all the same. Here it never sees SIGTERM
and SIGINT: they are held back in all its threads but one, which hands them on, and the workers take them when they are ready.

Exit code 0, 1 when a worker ended otherwise than well (its own code is in ``CPT_MEGA_EXIT_CODE_FILE``), 75 when a second
SIGINT was followed by force.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from cpt_mega.errors import ExitCode
from cpt_mega.loop.signals import ASKING

PATIENCE_S = 3.0  # after a second SIGINT: a process that waits within a library for another one cannot obey
_LOOK_S = 0.1


class SignalRelay:
    """Takes SIGTERM and SIGINT from this process and tells each of its workers, those that are started later too.

    Must be made before any thread is started: threads and workers inherit that these signals are held back.
    """

    def __init__(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        self.used_force = False
        self._received: list[int] = []
        self._told: dict[psutil.Process, int] = {}  # how many of them
        self._impatient_since: float | None = None
        threading.Thread(target=self._relay, name="signals", daemon=True).start()

    def _relay(self) -> None:
        self._receive(signal.sigwait(ASKING))
        while True:
            self._tell()
            received = signal.sigtimedwait(ASKING, _LOOK_S)
            if received is not None:
                self._receive(received.si_signo)
            if self._impatient_since is not None and time.monotonic() - self._impatient_since > PATIENCE_S:
                self._force()

    def _receive(self, number: int) -> None:
        self._received.append(number)
        if self._received.count(signal.SIGINT) > 1 and self._impatient_since is None:
            self._impatient_since = time.monotonic()

    def _tell(self) -> None:
        for worker in psutil.Process().children():
            for number in self._received[self._told.get(worker, 0) :]:
                # where the terminal's Ctrl-C reaches the worker by itself, another SIGINT would be a second one
                from_terminal = number == signal.SIGINT and _same_group(worker.pid)
                with contextlib.suppress(psutil.Error):
                    worker.send_signal(signal.SIGTERM if from_terminal else number)
            self._told[worker] = len(self._received)

    def _force(self) -> None:
        for worker in psutil.Process().children():
            self.used_force = True
            with contextlib.suppress(psutil.Error):
                worker.kill()


class _Faults(logging.Filter):
    """torchrun calls every end but 0 a failure, in a line a process; of those that are meant, the run has said why."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is worth the user's reading."""
        found = re.search(r"failed \(exitcode: (-?\d+)\)", record.getMessage())
        return found is None or int(found[1]) not in {*map(int, ExitCode)} - {int(ExitCode.FAULT)}


def main(words: Sequence[str]) -> int:
    """Runs torchrun; returns this process' exit code."""
    relay = SignalRelay()
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_Faults())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", "SIGHUP,SIGQUIT", *words])
    except (ChildFailedError, SignalException):  # the worker has said why; torchrun's own traceback would bury it
        return ExitCode.PREEMPTED if relay.used_force else 1
    return ExitCode.FINISHED


def _same_group(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid) == os.getpgid(0)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

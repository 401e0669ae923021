"""Where every process was when nothing went on: a stack dump of each, before the waiting ends as a fault."""

import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cpt_mega.config.schema import RunOptions
from cpt_mega.errors import CptMegaError, FaultError
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.trainer import Trainer

STACKS = "stacks"  # of the run folder
_SHARE = 0.8  # of the time-out, so that all have spoken before the first gives up
_RENEWALS = 10  # within a time-out; each starts a thread


class HangWatch(NullCallback):
    """Writes this process' stacks to ``run.dir/stacks/rank_00000.txt`` when no step has ended for most of the time-out.

    The interpreter's own watchdog does it, which needs no lock of the interpreter's: it speaks also where a library never
    gives one back. A process that is late, and those that wait for it, can be told apart by what they were doing. What a start
    before left is kept as ``rank_00000.before.txt``.
    """

    def __init__(self, options: RunOptions, rank: int):
        self._options, self._path = options, Path(options.dir) / STACKS / f"rank_{rank:05d}.txt"
        self._file: TextIO | None = None
        self._limit_s, self._armed = float(options.start_timeout_s), 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """From the start-up on. Raises FaultError in place of what a library raises after a silence, and says where to look."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size:
            self._path.replace(self._path.with_suffix(".before.txt"))
        with open(
            self._path, "a"
        ) as self._file:  # to append, so that the watchdog writes from the start after a truncation
            self._arm()
            try:
                yield
            except CptMegaError:
                raise
            except Exception as error:
                if not self._is_silent():
                    raise
                words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                told = f"a process hung or was lost: {self._path.parent} says where each one was"
                raise FaultError(f"no step ended for {_SHARE * self._limit_s:.0f} s; {told} ({words})") from error
            finally:
                faulthandler.cancel_dump_traceback_later()
                if not self._is_silent():
                    self._path.unlink(missing_ok=True)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        limit_s = float(self._options.timeout_s)
        if limit_s != self._limit_s or time.monotonic() - self._armed > _SHARE * limit_s / _RENEWALS:
            self._limit_s = limit_s
            self._arm()

    def restart(self) -> None:
        """What comes is a start again, and may take as long."""
        self._limit_s = float(self._options.start_timeout_s)
        self._arm()

    def _arm(self) -> None:
        """A step has ended: what was said of an earlier silence was only slow."""
        self._armed = time.monotonic()
        os.ftruncate(self._file.fileno(), 0)
        faulthandler.dump_traceback_later(_SHARE * self._limit_s, file=self._file)

    def _is_silent(self) -> bool:
        return time.monotonic() - self._armed > _SHARE * self._limit_s

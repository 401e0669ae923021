"""Units to parts, in as many processes as asked; the parts do not depend on it."""

import contextlib
import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from cpt_mega.data.encode import DocumentEncoder
from cpt_mega.data.parts import PartFolder
from cpt_mega.data.readers import Fields, Unit
from cpt_mega.errors import InputError
from cpt_mega.parent import is_orphan, signal_when_parent_ends

UNITS_AHEAD = 2  # per worker: enough to keep all busy
LOOK_S = 0.2
SIGNALS = {signal.SIGINT, signal.SIGTERM}
# Forked, not spawned: a worker starts at once with the encoder that was loaded and proved, and shares its tables. What
# makes that safe: encoders run in one thread, and a worker uses nothing else that has any.
CONTEXT = get_context("fork")

Progress = Callable[[int, int], None]


class UnitEncoder:
    """Makes parts of units.

    Args:
        encoder, fields: how documents are read and encoded.
        folder: opened; parts are written there.
        units: all of the run; a part has its unit's index.
        digest: of what the unit of a part stands for, see Unit.
    """

    def __init__(
        self,
        encoder: DocumentEncoder,
        fields: Fields,
        folder: PartFolder,
        units: list[Unit],
        digest: Callable[[int], str],
    ):
        self.encoder, self.fields, self.folder, self.units, self.digest = encoder, fields, folder, units, digest
        self.bytes, self.tokens = CONTEXT.Value("Q", 0), CONTEXT.Value("Q", 0)
        self.stop = CONTEXT.Event()

    def __call__(self, part: int, after_batch: Callable[[], None] = lambda: None) -> int:
        """Makes one part, unless told to stop; returns its number."""
        unit = self.units[part]
        with self.folder.write(part) as writer:
            for batch in unit.read(self.fields):
                encoded = self.encoder(batch)
                writer.add(encoded)
                self._count(encoded.input_bytes, encoded.tokens.size)
                after_batch()
                if self.stop.is_set():
                    return part
            writer.finish(self.digest(part))
        return part

    def progress(self) -> tuple[int, int]:
        """Bytes of input and tokens so far, of all processes."""
        return self.bytes.value, self.tokens.value

    def _count(self, input_bytes: int, tokens: int) -> None:
        for total, more in ((self.bytes, input_bytes), (self.tokens, tokens)):
            with total.get_lock():
                total.value += more


def make_parts(work: UnitEncoder, parts: Iterable[int], workers: int, progress: Progress) -> Iterator[int]:
    """Makes parts, in order or nearly so; yields the number of each that is complete.

    ``progress(bytes, tokens)`` is called several times a second with what has been done so far.
    Raises InputError when a worker is killed, and what ``work`` raises.
    """
    parts = list(parts)
    workers = min(workers, len(parts))

    def look() -> None:
        progress(*work.progress())

    if workers <= 1:
        yield from (work(part, look) for part in parts)
        return
    pool = ProcessPoolExecutor(workers, CONTEXT, _start_worker, (work, os.getpid()))
    try:
        yield from _as_completed(pool, deque(parts), UNITS_AHEAD * workers, look)
    except BrokenProcessPool as error:
        fix = "a worker died, most likely killed for its memory; use fewer, and run again to go on"
        raise InputError("--workers", workers, fix) from error
    finally:
        work.stop.set()
        with contextlib.suppress(BrokenProcessPool):
            pool.shutdown(cancel_futures=True)


def _as_completed(pool: ProcessPoolExecutor, parts: deque[int], ahead: int, look: Callable[[], None]) -> Iterator[int]:
    pending: set[Future] = set()
    while parts or pending:
        while parts and len(pending) < ahead:
            with signals_blocked():  # the first one forks the workers
                pending.add(pool.submit(_work_on, parts.popleft()))
        done, pending = wait(pending, LOOK_S, FIRST_COMPLETED)
        look()
        yield from sorted(future.result() for future in done)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """A worker is born with signals blocked, and lets them in when it has its own handlers (``begin_worker``)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(parent: int) -> None:
    """Ctrl-C reaches the parent, which ends its workers in order; without a parent there is nothing to work for."""
    gc.freeze()  # what came from the parent is not looked through again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal_when_parent_ends(signal.SIGKILL)
    if is_orphan(parent):
        os._exit(1)


def _start_worker(work: UnitEncoder, parent: int) -> None:
    global _work
    _work = work
    begin_worker(parent)


def _work_on(part: int) -> int:
    return _work(part)

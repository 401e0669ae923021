"""Digests of the inputs, taken while one process loads the tokenizer and the others would have nothing to do."""

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence

from cpt_mega.data.readers import Unit
from cpt_mega.data.workers import CONTEXT, begin_worker, signals_blocked

MOST_PROCESSES = 8
LEAST_BYTES = 64 << 20  # of the inputs: less is digested sooner than a process is there
DIGEST_BYTES = 32
WIDTH = 1 + DIGEST_BYTES  # of a unit in the table: whether its digest is there, and the digest


class DigestsAhead:
    """The digest of every unit: what was found ahead, else taken when it is asked for.

    As a context, processes take digests until it is left, from the last unit on: the last ones are those that a stopped run
    has still to do. What was not read until then is left to ``__call__``, so that nothing ever waits for it.

    Args:
        units: of the run.
        processes: how many may be used meanwhile; none for small inputs.
    """

    def __init__(self, units: Sequence[Unit], processes: int):
        self._units = units
        enough = sum(unit.input_bytes for unit in units) >= LEAST_BYTES
        self._shares = min(processes, MOST_PROCESSES, len(units)) if enough else 0
        self._table = mmap.mmap(-1, max(1, WIDTH * len(units)))  # shared with the processes
        self._processes = []

    def __enter__(self) -> "DigestsAhead":
        last_first = range(len(self._units) - 1, -1, -1)
        parent = os.getpid()
        for share in range(self._shares):
            words = (last_first[share :: self._shares], parent)
            process = CONTEXT.Process(target=self._take, args=words, daemon=True)
            with signals_blocked():
                process.start()
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # a unit that was begun costs less to do again than to wait for
            process.join()
        self._processes = []

    def __call__(self, part: int) -> str:
        """The SHA-256 of what a unit stands for, as hex."""
        found = self._table[part * WIDTH : (part + 1) * WIDTH]
        return found[1:].hex() if found[0] else self._units[part].digest()

    def _take(self, parts: Iterable[int], parent: int) -> None:
        begin_worker(parent)
        for part in parts:
            with contextlib.suppress(OSError):  # it is told by whoever reads the unit
                self._write(part, bytes.fromhex(self._units[part].digest()))

    def _write(self, part: int, digest: bytes) -> None:
        """The digest first: killed before the mark is set, there is none."""
        at = part * WIDTH
        self._table[at + 1 : at + WIDTH] = digest
        self._table[at] = 1

"""Digests of the inputs, taken while one process loads the tokenizer and the others would have nothing to do."""

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from zlib import crc32

from cpt_mega.data.readers import Unit
from cpt_mega.data.workers import CONTEXT, begin_worker, signals_blocked

MOST_PROCESSES = 8
LEAST_BYTES = 64 << 20  # of the inputs: less is digested sooner than a process is there
DIGEST_BYTES = 32
WIDTH = (
    DIGEST_BYTES + 4
)  # of a unit in the table: its digest and the CRC-32 of that, so that half of one is known for none
PATIENCE_S = 5.0  # for a process that was killed: one that waits for a device ends when that answers


class DigestsAhead:
    """The digest of every unit: what was found ahead, else taken when it is asked for.

    As a context, processes take digests until it is left, from the last unit on: the last ones are those that a stopped run
    has still to do. They are a help and no more: where none can be started, or what they had begun is not done by then,
    ``__call__`` does it. What is read later may be other bytes: a file that changes meanwhile is found out by its stamp.

    Args:
        units: of the run.
        processes: how many may be used meanwhile; none for small inputs.
    """

    def __init__(self, units: Sequence[Unit], processes: int):
        self._units = units
        enough = sum(unit.input_bytes for unit in units) >= LEAST_BYTES
        self._shares = min(processes, MOST_PROCESSES, len(units)) if enough else 0
        self._table = mmap.mmap(-1, max(1, WIDTH * len(units)))  # shared with the processes
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> "DigestsAhead":
        last_first = range(len(self._units) - 1, -1, -1)
        with signals_blocked(), contextlib.suppress(OSError):  # no room for another process
            for share in range(self._shares):
                words = (last_first[share :: self._shares], os.getpid())
                process = CONTEXT.Process(target=self._take, args=words, daemon=True)
                process.start()
                self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # a unit that was begun costs less to do again than to wait for
        for process in self._processes:
            process.join(PATIENCE_S)
        self._processes = []

    def __call__(self, part: int) -> str:
        """The SHA-256 of what a unit stands for, as hex."""
        found = self._known(part)
        return (self._taken(part) if found is None else found).hex()

    def _take(self, parts: Iterable[int], parent: int) -> None:
        begin_worker(parent)
        for part in parts:
            if self._known(part) is None:
                with contextlib.suppress(OSError):  # it is told by whoever reads the unit
                    self._taken(part)

    def _known(self, part: int) -> bytes | None:
        entry = self._table[part * WIDTH : (part + 1) * WIDTH]
        digest = entry[:DIGEST_BYTES]
        return digest if crc32(digest).to_bytes(4, "little") == entry[DIGEST_BYTES:] else None

    def _taken(self, part: int) -> bytes:
        digest = bytes.fromhex(self._units[part].digest())
        self._table[part * WIDTH : (part + 1) * WIDTH] = digest + crc32(digest).to_bytes(4, "little")
        return digest

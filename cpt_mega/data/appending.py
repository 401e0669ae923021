"""A large file that grows at its end, written past the page cache.

Through the cache every 4 KB of a corpus takes a page of memory that nobody reads soon, and that pushes out the input which
is being read. Where memory has to be asked for first, as in virtual machines, it is the dearest part of joining: 3.5 s of
one core for 1.2 GB, against 0.1 s past it (RESULTS.md).
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

BLOCK_BYTES = 4096  # what direct writes are multiples of, on any disk in use
BUFFER_BYTES = 8 << 20


class AppendedFile:
    """A file that other files are appended to.

    After every ``append`` the file holds all of it, and zeros up to a whole block; ``finish`` cuts these off. A file system
    without direct writes gets ordinary ones.

    Args:
        path: of the file; made if there is none.
        size: bytes of it that count; what lies behind them is cut off.
    """

    def __init__(self, path: Path, size: int):
        self._descriptor = _open(path)
        os.ftruncate(self._descriptor, size)
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # begins with a page, as direct writes want it
        self._at, self._held = size - size % BLOCK_BYTES, size % BLOCK_BYTES  # of the last block, which is not full
        with open(path, "rb") as stream:
            stream.seek(self._at)
            stream.readinto(self._buffer[: self._held])

    def append(self, source: Path) -> None:
        """Appends all of another file. Raises OSError when the disk is full."""
        with open(source, "rb", buffering=0) as stream:
            while read := stream.readinto(self._buffer[self._held :]):
                self._held += read
                self._write()

    def finish(self) -> None:
        """Cuts the file to its size, and waits until the disk has it."""
        os.ftruncate(self._descriptor, self._at + self._held)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        os.close(self._descriptor)

    def _write(self) -> None:
        """Writes what is held; the last block, when it is not full, stays held and is written again."""
        padding = -self._held % BLOCK_BYTES
        self._buffer[self._held : self._held + padding] = bytes(padding)
        _write_all(self._descriptor, self._buffer[: self._held + padding], self._at)
        full = self._held - self._held % BLOCK_BYTES
        self._buffer[: self._held - full] = bytes(self._buffer[full : self._held])
        self._at, self._held = self._at + full, self._held - full


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        try:
            written = os.pwrite(descriptor, data, at)
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # opened, and refused only now; or a write that ended within a block
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        data, at = data[written:], at + written

"""SHA-256 of large files on a second thread, while the first converts: hashing is as slow as converting."""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cpt_mega.errors import CptMegaError

_PIECE_BYTES = 8 * 1024**2


class BackgroundDigests:
    """Files to be digested in the order they are given; a context manager that stops at once when it is left."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._stop = threading.Event()
        self._digests: dict[Path, Future] = {}

    def __enter__(self) -> "BackgroundDigests":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def add(self, path: Path) -> None:
        """Starts on a file that will not change any more."""
        self._digests[path] = self._pool.submit(self._digest, path)

    def measured(self, path: Path) -> dict:
        """``{"bytes", "sha256"}`` of an added file, waiting for it. Raises OSError when it cannot be read."""
        return {"bytes": path.stat().st_size, "sha256": self._digests[path].result()}

    def _digest(self, path: Path) -> str:
        total, piece = hashlib.sha256(), bytearray(_PIECE_BYTES)
        with open(path, "rb", buffering=0) as stream:
            while count := stream.readinto(piece):
                if self._stop.is_set():
                    raise CptMegaError("stopped")
                total.update(memoryview(piece)[:count])
        return total.hexdigest()

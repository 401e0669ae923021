"""What the start of a run is made of, in seconds."""

import time


class StartUp:
    """Seconds of each part of the start, from the start of the process where the system tells it."""

    def __init__(self):
        self.parts: list[tuple[str, float]] = []
        self._last = time.time()
        began = _process_start()
        if began is not None:
            self.parts.append(("imports", self._last - began))

    def begin_again(self) -> None:
        """For another start in this process: what was done since the first is no part of it."""
        self.parts, self._last = [], time.time()

    def mark(self, name: str) -> None:
        now = time.time()
        self.parts.append((name, now - self._last))
        self._last = now

    def __str__(self) -> str:
        words = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts)
        return f"{sum(s for _, s in self.parts):.1f} s ({words})"


def _process_start() -> float | None:
    """When this process was started, in seconds since the epoch."""
    import psutil

    try:
        return psutil.Process().create_time()
    except psutil.Error:
        return None

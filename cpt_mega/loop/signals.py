"""SIGTERM and SIGINT become a request that the loop sees at the next step boundary; a second SIGINT stops at once."""

import signal


class StopRequest:
    """Remembers the first signal. Used as a context manager; restores the old handlers on exit."""

    def __init__(self):
        self.name: str | None = None
        self._old: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        # torchrun turns Ctrl-C into a SIGTERM that follows the terminal's SIGINT: only a second SIGINT is impatience.
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name

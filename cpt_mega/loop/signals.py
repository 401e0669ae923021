"""SIGTERM and SIGINT become a request that the loop sees at the next step boundary; a second SIGINT stops at once."""

import signal

ASKING = (signal.SIGTERM, signal.SIGINT)  # what asks a run to end


class StopRequest:
    """Remembers the first signal. Used as a context manager, also within itself; restores the old handlers on exit.

    It is entered before anything heavy is imported. ``cpt_mega.launch`` starts the trainer with these signals held back, so
    that one which came even before is seen then.
    """

    def __init__(self):
        self.name: str | None = None
        self._interrupts = 0
        self._old: list[dict] = []

    def __enter__(self) -> "StopRequest":
        self._old.append({number: signal.signal(number, self._remember) for number in ASKING})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._old.pop().items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        # A terminal and a launcher may both tell of one Ctrl-C, the launcher by SIGTERM: only a second SIGINT is impatience.
        self.name = self.name or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

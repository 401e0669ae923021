"""How far preprocessing is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0


class EncodingProgress:
    """Shows MB/s of input, tokens/s and the time left, while a ``with`` block runs.

    Args:
        stream: where to show it; a bar if it is a terminal, else one line every ten seconds.
    """

    def __init__(self, stream: TextIO = sys.stderr):
        self.stream = stream
        self.total_bytes = self.before = self.bytes = self.tokens = 0
        columns = TextColumn("encoding"), BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.fields[rates]}")
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(file=stream))
        self._terminal = stream.isatty()

    def __enter__(self) -> "EncodingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bar.stop()

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Encoding begins; so much of it has been done before."""
        self.total_bytes, self.before = total_bytes, done_bytes
        self._begun = self._shown = time.monotonic()
        if done_bytes:
            print(f"going on: {done_bytes / max(total_bytes, 1):.0%} was encoded before", file=self.stream, flush=True)
        self._task = self._bar.add_task("encoding", total=total_bytes, completed=done_bytes, rates="")

    def advance(self, done_bytes: int, tokens: int) -> None:
        """So much since then, in all. On a terminal the bar is drawn here and by no thread: workers are forked."""
        self.bytes, self.tokens = done_bytes, tokens
        if self._terminal:
            self._bar.update(self._task, completed=self.before + self.bytes, rates=self._rates())
            self._bar.start()
        elif time.monotonic() - self._shown > PLAIN_INTERVAL_S:
            self._shown = time.monotonic()
            share = (self.before + self.bytes) / max(self.total_bytes, 1)
            print(f"encoding {share:.0%}  {self._rates()}  left {self._left_s()} s", file=self.stream, flush=True)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._begun, 1e-9)

    def _rates(self) -> str:
        return f"{self.bytes / 1e6 / self._seconds():.1f} MB/s  {self.tokens / self._seconds():,.0f} tokens/s"

    def _left_s(self) -> int:
        return round(self._seconds() * (self.total_bytes - self.before - self.bytes) / max(self.bytes, 1))

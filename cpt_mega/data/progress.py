"""How far preprocessing is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cpt_mega.data.encode import EncodedChunk

PLAIN_INTERVAL_S = 10.0


class EncodingProgress:
    """Shows MB/s of input, tokens/s and the time left, while a ``with`` block runs.

    Args:
        total_bytes: of all inputs.
        stream: where to show it; a bar if it is a terminal, else one line every ten seconds.
    """

    def __init__(self, total_bytes: int, stream: TextIO = sys.stderr):
        self.total_bytes, self.stream = total_bytes, stream
        self.bytes = self.tokens = 0
        columns = TextColumn("encoding"), BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.fields[rates]}")
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(file=stream))
        self._task = self._bar.add_task("encoding", total=total_bytes, rates="")
        self._terminal = stream.isatty()

    def __enter__(self) -> "EncodingProgress":
        self._begun = self._shown = time.monotonic()
        if self._terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bar.stop()

    def advance(self, chunk: EncodedChunk) -> None:
        """Counts one encoded chunk."""
        self.bytes += chunk.input_bytes
        self.tokens += chunk.tokens.size
        if self._terminal:
            self._bar.update(self._task, completed=self.bytes, rates=self._rates())
        elif time.monotonic() - self._shown > PLAIN_INTERVAL_S:
            self._shown = time.monotonic()
            share = self.bytes / self.total_bytes
            print(f"encoding {share:.0%}  {self._rates()}  left {self._left_s()} s", file=self.stream, flush=True)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._begun, 1e-9)

    def _rates(self) -> str:
        return f"{self.bytes / 1e6 / self._seconds():.1f} MB/s  {self.tokens / self._seconds():,.0f} tokens/s"

    def _left_s(self) -> int:
        return round(self._seconds() * (self.total_bytes - self.bytes) / max(self.bytes, 1))

"""The next batch, drawn and read by a thread while the device computes this one.

Each batch carries the stream's state right after it was drawn: what a checkpoint keeps is where the last computed step
stood, however far ahead the thread has read.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from cpt_mega.data.row_checks import RowHit
from cpt_mega.data.rows import PackedRow
from cpt_mega.data.stream import MixedStream, RowRef
from cpt_mega.data.stream_state import StreamState
from cpt_mega.engine.step import PreparedBatch

LOOK_S = 1.0  # between two looks at whether the corpora are still those that were opened


@dataclass(frozen=True)
class DrawnBatch:
    """A global batch as the stream gave it, and this rank's part of it.

    Attributes:
        tokens: what it adds to the ledgers: tokens of all its rows that count for the loss.
        real_tokens: those and what a loss mask leaves out of them: what is computed.
        stream_state: JSON of the stream's state after it.
        tokens_by_source: tokens drawn from each source since the run began, this batch included.
        epochs_by_source: how often each source has been read since the run began.
        hits: odd rows in it, or stepped past for it.
        dropped: sources that had no more to give for it.
    """

    refs: list[RowRef]
    tokens: int
    real_tokens: int
    prepared: PreparedBatch
    stream_state: dict
    tokens_by_source: dict[str, int]
    epochs_by_source: dict[str, float]
    hits: list[RowHit]
    dropped: list[str]


class Prefetcher:
    """Batches of ``rows`` rows, one ahead. Errors of reading are raised by ``next``.

    Args:
        prepare: ``Engine.prepare``, given a count, a function that reads a row, and the rows' attention work.
    """

    def __init__(
        self,
        stream: MixedStream,
        prepare: Callable[[int, Callable[[int], PackedRow], Sequence[float]], PreparedBatch],
        rows: int,
    ):
        self._stream, self._prepare, self._rows = stream, prepare, rows
        self._looked = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: Future[DrawnBatch] = self._thread.submit(self._draw)

    def next(self) -> DrawnBatch:
        """The next batch; drawing the one after it begins."""
        batch = self._ahead.result()
        self._ahead = self._thread.submit(self._draw)
        return batch

    def redraw(self, state: dict, change: Callable[[MixedStream], None]) -> dict:
        """Draws the batch ahead anew, after a change to the stream where a saved state of it stands; the changed state."""
        self.rest()
        self._stream.go_on_from(StreamState.from_json(state))
        self._stream.take_hits()  # of the batch that is drawn anew
        try:
            change(self._stream)
            return self._stream.state.to_json()
        finally:  # also after a change that was refused, which has changed nothing
            self._ahead = self._thread.submit(self._draw)

    def rest(self) -> None:
        """Waits until the batch ahead is there; the thread then has nothing to do. Its error, if any, stays for ``next``."""
        if not self._ahead.cancelled():  # waiting for one that was cancelled never ends
            wait([self._ahead])

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        at_once = kind is not None and issubclass(kind, KeyboardInterrupt)  # a row may never come
        self._thread.shutdown(wait=not at_once, cancel_futures=True)
        if at_once:
            return
        left = None if self._ahead.cancelled() else self._ahead.exception()
        if left is not None and left is not error:  # nobody will look at it, and its frames would keep the engine
            left.with_traceback(None)

    def _draw(self) -> DrawnBatch:
        if time.monotonic() - self._looked >= LOOK_S:  # on a network's file system a look is not for nothing
            self._stream.check_corpora()
            self._looked = time.monotonic()
        dropped, tokens = self._stream.dropped, self._stream.tokens
        refs = self._stream.next_batch(self._rows)
        state = self._stream.state
        work = [self._stream.attention_work(ref) for ref in refs]
        prepared = self._prepare(len(refs), lambda position: self._stream.read(refs[position]), work)
        return DrawnBatch(
            refs,
            self._stream.tokens - tokens,
            sum(map(self._stream.row_tokens, refs)),
            prepared,
            state.to_json(),
            {name: source.tokens for name, source in state.sources.items()},
            self._stream.epochs,
            self._stream.take_hits(),
            [name for name in state.dropped if name not in dropped],
        )

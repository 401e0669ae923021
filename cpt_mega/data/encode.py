"""Chunks of documents to tokens, in as many processes as asked, in the order they came."""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from cpt_mega.data.indexed import token_dtype
from cpt_mega.data.readers import Chunk, Document
from cpt_mega.data.rejects import Reject
from cpt_mega.data.routes import REFERENCE, open_route
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError

CHUNKS_AHEAD = 3  # per worker: enough to keep all busy, and what bounds the memory
DEFERRED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class EncodedChunk:
    """Documents of a chunk as tokens [sum of lengths] and lengths [documents], with what was left out."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    input_bytes: int
    rejects: list[Reject]


class ChunkEncoder:
    """Parses and encodes chunks.

    Args:
        tokenizer: path that ``TextTokenizer.load`` takes; loaded here, because encoders do not travel to workers.
        bos: whether BOS begins every document.
        route: a name of ``routes.ROUTES``, proved before.
    """

    def __init__(self, tokenizer: str, bos: bool, route: str = REFERENCE):
        # A worker is one thread: with more, workers of one machine would fight for its cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tokenizer, self.bos = TextTokenizer.load(tokenizer), bos
        self.route = open_route(self.tokenizer, route)
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        parsed = list(chunk.parse())
        documents = [item for item in parsed if isinstance(item, Document)]
        rejects = [item for item in parsed if isinstance(item, Reject)]
        ids, counts = self.route.encode([document.text for document in documents])
        self._check_range(ids)
        tokens, lengths, kept = self.tokenizer.stored_documents(ids.astype(self.dtype, copy=False), counts, self.bos)
        text_bytes = sum(len(documents[index].text.encode()) for index in kept)
        if len(kept) < len(documents):
            empty = set(range(len(documents))).difference(kept.tolist())
            rejects += [documents[index].rejected("empty") for index in empty]
        rejects.sort(key=lambda reject: reject.line)
        return EncodedChunk(tokens, lengths, text_bytes, chunk.input_bytes, rejects)

    def _check_range(self, ids: np.ndarray) -> None:
        """An encoder that was exact on a sample may still err; what does not fit would be stored as another token."""
        if ids.size and ids.max() >= self.tokenizer.vocab_size:
            fix = f"outside the vocabulary of {self.tokenizer.vocab_size}; use --encoder reference, and report it"
            raise InputError("token id", int(ids.max()), fix)


def encode_chunks(
    chunks: Iterator[Chunk], tokenizer: str, bos: bool, workers: int, route: str = REFERENCE
) -> Iterator[EncodedChunk]:
    """Encodes chunks in order; the result does not depend on the number of workers.

    Raises InputError when the tokenizer cannot be loaded or a worker is killed.
    """
    if workers == 1:
        yield from map(ChunkEncoder(tokenizer, bos, route), chunks)
        return
    # Not forked: a forked tokenizer can deadlock on its threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, bos, route))
    try:
        yield from _in_order(pool, chunks, CHUNKS_AHEAD * workers)
    except BrokenProcessPool as error:
        fix = "a worker died, most likely killed for its memory; use fewer"
        raise InputError("--workers", workers, fix) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[Chunk], ahead: int) -> Iterator[EncodedChunk]:
    pending = deque()
    for chunk in chunks:
        with _signals_deferred():  # the pool starts its workers one by one as chunks come
            pending.append(pool.submit(_encode, chunk))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Lets a worker start undisturbed: a signal in between would leave it half started, to die with a traceback.

    Workers inherit the blocked SIGINT: Ctrl-C reaches this process alone, which then ends them in order.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs here, and none may be set
        yield
        return
    caught = []
    handlers = {number: signal.signal(number, lambda *args: caught.append(args[0])) for number in DEFERRED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in caught[:1]:
            signal.raise_signal(number)


def _start_worker(tokenizer: str, bos: bool, route: str) -> None:
    global _worker
    _worker = ChunkEncoder(tokenizer, bos, route)


def _encode(chunk: Chunk) -> EncodedChunk:
    return _worker(chunk)

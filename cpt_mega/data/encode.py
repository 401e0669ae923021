"""Documents to tokens, as a corpus stores them."""

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpt_mega.data.indexed import token_dtype
from cpt_mega.data.readers import Batch, Document
from cpt_mega.data.rejects import EMPTY, Reject
from cpt_mega.data.routes import Route
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError

# A process encodes in one thread: with more, the processes of one machine would fight for its cores, and a process
# forked from one with threads can hang.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of a batch as they are stored, and what was left out.

    Attributes:
        tokens: [sum of lengths], in the corpus' dtype.
        lengths: int64 [documents].
        mask: uint8 [sum of lengths], 1 for a target that counts; None where all do.
        kept: the documents that the lengths are of.
        text_bytes: UTF-8 bytes of their text.
        rejects: in order.
        lines, input_bytes: see Batch.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    kept: list[Document]
    text_bytes: int
    rejects: list[Reject]
    lines: int
    input_bytes: int


class DocumentEncoder(Protocol):
    """Turns batches of documents into tokens; a process has one."""

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Raises InputError when the encoder gives ids that are no tokens."""


class TextDocuments:
    """Encodes plain text.

    Args:
        tokenizer: whose ids they are.
        bos: whether BOS begins every document.
        route: from texts to ids, proved before.
    """

    def __init__(self, tokenizer: TextTokenizer, bos: bool, route: Route):
        self.tokenizer, self.bos, self.route = tokenizer, bos, route
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> EncodedBatch:
        """See DocumentEncoder."""
        documents = batch.documents
        ids, counts = self.route.encode([document.content for document in documents])
        check_ids(ids, self.tokenizer.vocab_size)
        ids = ids.view(self.dtype) if ids.dtype.itemsize == self.dtype.itemsize else ids.astype(self.dtype)
        tokens, lengths, kept = self.tokenizer.stored_documents(ids, counts, self.bos)
        stored = [documents[index] for index in kept]
        size = sum(_utf8_size(document.content) for document in stored)
        return EncodedBatch(
            tokens, lengths, None, stored, size, left_out(batch, stored), batch.lines, batch.input_bytes
        )


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises InputError for an id outside the vocabulary.

    An encoder that was exact on a sample may still err; what does not fit would be stored as another token.
    """
    if ids.size and ids.max() >= vocab_size:
        fix = f"outside the vocabulary of {vocab_size}; use --encoder reference, and report it"
        raise InputError("token id", int(ids.max()), fix)


def left_out(batch: Batch, stored: list[Document]) -> list[Reject]:
    """What a batch holds beside the documents that are stored, in order; documents that are not, as empty ones."""
    if len(stored) == len(batch.items):
        return []
    kept = set(map(id, stored))
    others = (item for item in batch.items if id(item) not in kept)
    return [item if isinstance(item, Reject) else item.rejected(EMPTY) for item in others]


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())

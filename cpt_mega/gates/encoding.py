"""Texts and what goes on behind them, as requests to the model."""

from collections.abc import Callable, Sequence

import numpy as np

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.chats import ChatTexts
from cpt_mega.gates.requests import Request

_BEFORE = ("", " ", "\n")  # what a text stands behind in a document; its first token is another one then

_Encode = Callable[[Sequence[str]], list[list[int]]]


class Encoder:
    """A tokenizer's habits: BOS where it adds one, special tokens only where it puts them.

    A text and its continuation are encoded as one, for that is how the model has seen text: encoded apart, a blank between
    them could become a token that it never saw there. What is scored are the tokens from the first on that the text alone
    does not have.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self._front = [tokenizer.bos_id] if tokenizer.adds_bos else []
        # Something must come before the first token that is scored; in a stream of documents it is the end of the last one.
        self._start = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]

    def continued(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """A request for each text and its continuation. Raises InputError for a continuation that has no token."""
        return self._requests(pairs, self.tokenizer.encode_batch, self._front)

    def replied(self, pairs: Sequence[tuple[str, str]], chats: ChatTexts) -> list[Request]:
        """The same for texts that a chat template rendered."""
        return self._requests(pairs, chats.encode, [])

    def opened(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts from the start of a document, without its end."""
        return [self._front + ids for ids in self.tokenizer.encode_batch(texts)]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of documents as a corpus stores them."""
        return [self.tokenizer.document_ids(ids) for ids in self.tokenizer.encode_batch(texts)]

    def forms(self, texts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        """Token ids of each text as it occurs within documents, int64 [n], those that differ; the first is that at a start."""
        found: list[dict[tuple[int, ...], None]] = [{} for _ in texts]
        for before, alone in zip(_BEFORE, self.tokenizer.encode_batch(_BEFORE), strict=True):
            for own, ids in zip(found, self.tokenizer.encode_batch([before + text for text in texts]), strict=True):
                own[tuple(ids[len(alone) :] if ids[: len(alone)] == alone else ids)] = None
        return [tuple(np.array(ids, np.int64) for ids in own) for own in found]

    def _requests(self, pairs: Sequence[tuple[str, str]], encode: _Encode, front: list[int]) -> list[Request]:
        before = encode([text for text, _ in pairs])
        whole = encode([text + more for text, more in pairs])
        for (_, more), alone, ids in zip(pairs, before, whole, strict=True):
            if ids == alone:  # it has none, or only what a normaliser takes away
                raise InputError("items", more, "has no token under this tokenizer; leave the item out")
        return [self._request(*ids, front) for ids in zip(before, whole, strict=True)]

    def _request(self, before: list[int], whole: list[int], front: list[int]) -> Request:
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        first = min(same, len(whole) - 1)
        front = front or ([] if first else self._start)
        return Request(np.array([*front, *whole], np.int64), len(front) + first)

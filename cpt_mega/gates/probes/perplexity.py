"""Perplexity and bits per byte of fixed held-out documents.

A document that is longer than a row is read by a window that moves half a row at a time, so that every token but the first of
the document is scored once, and all but those of the first window with at least half a row of context.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpt_mega.gates.probes.probe import OTHER, Content, ItemScore, Reading
from cpt_mega.gates.requests import Likelihood, Request


@dataclass(frozen=True)
class ScoredDocument:
    """Tokens of a document as a corpus stores them.

    Attributes:
        tokens: int64 [n], n > 1.
        counts: bool [n], which of them count as targets; None: all but the first.
        size: bytes of the text, that of a first token which nothing predicts included; None where nobody knows, and where
            not all of it counts.
    """

    id: str
    tokens: np.ndarray
    counts: np.ndarray | None = None
    size: int | None = None


class Perplexity:
    """Documents, one item each."""

    scale = OTHER

    def __init__(self, name: str, bucket: str, documents: Sequence[ScoredDocument], window: int):
        self.name, self.bucket = name, bucket
        self._documents, self._window = list(documents), window
        self.ids = [document.id for document in self._documents]
        windows = [list(_windows(document, window)) for document in self._documents]
        self._counts = [len(requests) for requests in windows]
        self.requests = [request for requests in windows for request in requests]

    def contents(self) -> list[Content]:
        """See Probe: the document as a corpus stores it."""
        return [Content(document.id, (document.tokens,)) for document in self._documents]

    def identity(self) -> object:
        """See Probe."""
        digest = hashlib.sha256()
        for document in self._documents:
            counts = b"" if document.counts is None else document.counts.astype(np.uint8).tobytes()
            for part in (document.id.encode(), document.tokens.astype("<i8").tobytes(), counts):
                digest.update(len(part).to_bytes(8, "little") + part)
        return ["perplexity", self.name, self.bucket, self._window, digest.hexdigest()]

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """See Probe."""
        found, at = [], 0
        for document, count in zip(self._documents, self._counts, strict=True):
            found.append(_score(document, answers[at : at + count]))
            at += count
        return found

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe."""
        nll, n = (math.fsum(item.values[name] for item in items) for name in ("nll", "targets"))
        found = [Reading("perplexity", perplexity_of(nll, int(n)), int(n))]
        if all("bytes" in item.values for item in items):
            size = math.fsum(item.values["bytes"] for item in items)
            found.append(Reading("bits_per_byte", nll / math.log(2) / size, int(size)))
        return found


def perplexities(documents: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """By bucket, of the buckets and values (``nll``, ``targets``) of documents."""
    sums: dict[str, tuple[float, int]] = {}
    for bucket, values in documents:
        nll, n = sums.get(bucket, (0.0, 0))
        sums[bucket] = nll + values["nll"], n + int(values["targets"])
    return {bucket: perplexity_of(*total) for bucket, total in sums.items()}


def perplexity_of(nll: float, n: int) -> float:
    """exp of the mean negative log-likelihood (nats) a token; inf when it overflows or is none."""
    mean = nll / max(n, 1)
    return math.exp(mean) if mean < 700 else math.inf


def _windows(document: ScoredDocument, window: int) -> Iterator[Request]:
    """Of ``window`` inputs at most, each token but the first scored in exactly one."""
    tokens, counts, stride, scored = document.tokens, document.counts, max(1, window // 2), 1
    for start in range(0, len(tokens), stride):
        end = min(start + window + 1, len(tokens))
        if end > scored:
            yield Request(tokens[start:end], scored - start, counts=None if counts is None else counts[start:end])
            scored = end
        if end == len(tokens):
            return


def _score(document: ScoredDocument, answers: Sequence[Likelihood]) -> ItemScore:
    nll = -math.fsum(answer.logprob for answer in answers)
    targets = sum(answer.targets for answer in answers)
    values = {"nll": nll, "targets": float(targets)}
    if document.size is not None:
        values["bytes"] = float(document.size)
    return ItemScore(document.id, -nll / targets, values)

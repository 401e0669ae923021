"""Whether a document sees the one before it in the row.

Each item's target can only be known from its first document. Its log-probability behind the second document is measured
three times: with the second alone, with both as the two documents of a row, and with both as one document. The first two
must be equal; the third shows that a leak would have been seen.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import BoundaryItem
from cpt_mega.gates.probes.probe import OTHER, ItemScore, Reading
from cpt_mega.gates.requests import Likelihood, Request


class Boundaries:
    """Pairs of documents."""

    scale = OTHER

    def __init__(self, name: str, bucket: str, items: Sequence[BoundaryItem], encoder: Encoder):
        self.name, self.bucket = name, bucket
        self._items = list(items)
        self.ids = [item.id for item in self._items]
        alone = encoder.continued([(item.second, f" {item.target}") for item in self._items])
        before = encoder.documents([item.first for item in self._items])
        self.requests = [
            request
            for ids, second in zip(before, alone, strict=True)
            for request in (second, _behind(ids, second, apart=True), _behind(ids, second, apart=False))
        ]

    def contents(self) -> None:
        """See Probe: a leak shows whether a document was seen before or not."""

    def identity(self) -> object:
        """See Probe."""
        items = [[item.id, item.first, item.second, item.target] for item in self._items]
        return ["boundaries", self.name, self.bucket, items]

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """See Probe."""
        triples = zip(answers[::3], answers[1::3], answers[2::3], strict=True)
        return [_score(item, *three) for item, three in zip(self._items, triples, strict=True)]

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe: the largest change a target token by a document before it, and what reading that document brings."""
        leaks = [abs(item.values["leaked"]) for item in items]
        worst = max(leaks) if all(map(math.isfinite, leaks)) else math.nan  # which a broken mask may well give
        gain = fmean(item.values["gain"] for item in items)
        return [Reading("largest_leak_nats", worst, len(items)), Reading("gain_nats", gain, len(items))]


def _behind(ids: Sequence[int], second: Request, apart: bool) -> Request:
    """The second document behind the first, as another one or as its continuation."""
    tokens = np.concatenate([np.array(ids, np.int64), second.tokens])
    return Request(tokens, len(ids) + second.first, (len(ids), len(second.tokens)) if apart else ())


def _score(item: BoundaryItem, alone: Likelihood, apart: Likelihood, together: Likelihood) -> ItemScore:
    leaked = (apart.logprob - alone.logprob) / alone.targets
    gain = (together.logprob - alone.logprob) / alone.targets
    return ItemScore(item.id, -abs(leaked), {"leaked": leaked, "gain": gain, "alone": alone.logprob / alone.targets})

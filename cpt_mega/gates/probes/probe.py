"""What all probes are: fixed items, requests for them, and scores from the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cpt_mega.gates.requests import Likelihood, Request

RIGHT_OR_WRONG, BITS_PER_BYTE, OTHER = "right_or_wrong", "bits_per_byte", "other"


@dataclass(frozen=True)
class ItemScore:
    """What was found of one item.

    Attributes:
        id: the item's; unique in its probe.
        score: what is compared with that of step 0; higher is better.
        values: all that was measured, so that every reading and rule can be computed again from these lines.
    """

    id: str
    score: float
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One number over all items of a probe: ``n`` of what it is a mean over (items, or target tokens)."""

    metric: str
    value: float
    n: int


@dataclass(frozen=True)
class Content:
    """What of an item could be learnt by heart, without anything that stands around it.

    Attributes:
        id: the item's.
        forms: its tokens as a corpus may hold them, int64 [n] each: the first ones depend on what is before the text.
    """

    id: str
    forms: tuple[np.ndarray, ...]


class Probe(Protocol):
    """One kind of measurement over fixed items.

    Attributes:
        name, bucket: as the suite has them.
        scale: what scores are: RIGHT_OR_WRONG (1 or 0), BITS_PER_BYTE (negated), or of another kind.
        ids: of the items, in their order.
        requests: what the model is asked, the same at every look.
    """

    name: str
    bucket: str
    scale: str
    ids: Sequence[str]
    requests: Sequence[Request]

    def contents(self) -> list[Content] | None:
        """Of each item; None for a probe whose items tell nothing when they were trained on."""

    def identity(self) -> object:
        """Plain values that name everything but the model that a score depends on."""

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """Scores from the answers to ``requests``, in the order of the items."""

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """Numbers over all items; the first is the one to look at."""

"""Cheap looks at a row before it is trained on: for what broken extraction and templates leave in corpora.

Each look is a pure function of the row's tokens, so every rank of a run comes to the same answer without asking another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OFF, LOG, MASK, SKIP = "off", "log", "mask", "skip"
LONGEST_PERIOD = 64  # tokens


@dataclass(frozen=True)
class RowChecks:
    """What is odd in a row, and what is done about it.

    Attributes:
        action: ``OFF`` looks at nothing; ``LOG`` trains on an odd row and writes it down; ``MASK`` takes its targets out of the
            loss; ``SKIP`` takes the source's next row instead.
        max_run: tokens in a row that are the same one.
        max_periodic_share: of tokens that are the same as the one a fixed distance before, for the best distance up to 64.
        min_unique_share: of different tokens among all.
    """

    action: str = OFF
    max_run: int = 256
    max_periodic_share: float = 0.75
    min_unique_share: float = 0.02

    def problem(self, ids: np.ndarray) -> str | None:
        """What is odd about the real tokens of a row, int64 [tokens]; None for most rows."""
        run = longest_run(ids)
        if run > self.max_run:
            return f"the same token {run} times in a row"
        unique = len(np.unique(ids)) / max(len(ids), 1)
        if unique < self.min_unique_share:
            return f"{unique:.1%} of its tokens are different ones"
        share, period = periodic_share(ids)
        if share > self.max_periodic_share:
            return f"{share:.0%} of its tokens repeat those {period} before"
        return None


@dataclass(frozen=True)
class RowHit:
    """A row that was found odd: which row of which source, the documents in it, why, and what was done."""

    source: str
    row: int
    documents: Sequence[int]
    problem: str
    action: str


def longest_run(ids: np.ndarray) -> int:
    """The most equal tokens one behind the other; 0 of none."""
    changes = np.flatnonzero(np.diff(ids)) + 1
    return int(np.diff(changes, prepend=0, append=len(ids)).max()) if len(ids) else 0


def periodic_share(ids: np.ndarray) -> tuple[float, int]:
    """Which share of tokens equals the one a period before, for the period from 1 to 64 with the largest share."""
    best = (0.0, 0)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // 2) + 1):
        share = float(np.count_nonzero(ids[period:] == ids[:-period])) / len(ids)
        best = max(best, (share, period), key=lambda found: found[0])
    return best

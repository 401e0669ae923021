"""Which rank computes which rows of a global batch, so that no rank waits long for another.

Rows have one length, but attention within documents costs the sum of their squared lengths, and a row that is one document
costs many times one of fifty. What a batch holds is fixed before; its loss is a sum over all of its tokens, so who
computes which row changes nothing but the order of additions.
"""

import heapq
from collections.abc import Sequence

import numpy as np

MOST_EXCHANGES = 64
CLOSE_ENOUGH = 1.02  # busiest over mean


def deal_rows(work: Sequence[float], ranks: int, micro_batch: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, of ``micro_batch`` row indices each; every rank has as many.

    Largest first to the rank that has least so far, then pairs of rows are exchanged while that takes the busiest rank
    down. A rank's micro-batches are dealt likewise, the heaviest first, so that those that run together are alike.

    Args:
        work: of each row, in any unit; a multiple of ``ranks * micro_batch`` rows.
    """
    work = np.asarray(work, np.float64)
    held = _exchanged(_dealt(np.arange(len(work)), work, ranks), work)
    return [_micro_batches(rows, work, micro_batch) for rows in held]


def _dealt(rows: np.ndarray, work: np.ndarray, hands: int) -> np.ndarray:
    """As many rows to every hand, int64 [hands, rows / hands]."""
    each = len(rows) // hands
    held: list[list[int]] = [[] for _ in range(hands)]
    least = [(0.0, 0, hand) for hand in range(hands)]  # work, rows, hand
    for row in rows[np.argsort(-work[rows], kind="stable")].tolist():
        total, count, hand = heapq.heappop(least)
        held[hand].append(row)
        if count + 1 < each:
            heapq.heappush(least, (total + float(work[row]), count + 1, hand))
    return np.array(held)


def _exchanged(held: np.ndarray, work: np.ndarray) -> np.ndarray:
    """Takes rows off the busiest hand against lighter ones, as long as that helps."""
    for _ in range(MOST_EXCHANGES if len(held) > 1 else 0):
        of_rows = work[held]
        totals = of_rows.sum(axis=1)
        busiest = int(totals.argmax())
        if totals[busiest] <= CLOSE_ENOUGH * totals.mean():
            break
        less = of_rows[busiest][:, None, None] - of_rows  # [mine, hand, theirs]
        after = np.maximum(totals[busiest] - less, totals[:, None] + less)
        mine, other, theirs = np.unravel_index(after.argmin(), after.shape)
        if after[mine, other, theirs] >= totals[busiest]:
            break
        held[busiest, mine], held[other, theirs] = held[other, theirs], held[busiest, mine]
    return held


def _micro_batches(rows: np.ndarray, work: np.ndarray, size: int) -> list[list[int]]:
    batches = _dealt(rows, work, len(rows) // size)
    return batches[np.argsort(-work[batches].sum(axis=1), kind="stable")].tolist()

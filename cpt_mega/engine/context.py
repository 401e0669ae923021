"""How packed documents are shared out over context-parallel ranks.

Every document is filled up to a multiple of ``2 * size`` tokens and cut into ``2 * size`` chunks; rank r holds chunks r and
``2 * size - 1 - r``, so that each rank has as much to attend to as any other. This is the order in which Transformer
Engine's THD attention and core's rotary embedding of packed rows expect it (``rope_utils._get_thd_freqs_on_this_cp_rank``).
The filling comes after a document's last token: causal attention never sees it, and it has no target.
"""

from collections.abc import Sequence

import numpy as np

FILLING = -1


def filled_lengths(lengths: Sequence[int], size: int) -> list[int]:
    """Lengths of documents filled up for ``size`` context-parallel ranks."""
    multiple = 2 * size if size > 1 else 1
    return [length + -length % multiple for length in lengths]


def rank_positions(lengths: Sequence[int], size: int, rank: int) -> np.ndarray:
    """int64 [sum(filled_lengths) / size]: for each token of this rank, its position among the unfilled documents.

    ``FILLING`` where there is no token.
    """
    parts, start = [], 0
    for length, filled in zip(lengths, filled_lengths(lengths, size), strict=True):
        places = np.full(filled, FILLING, np.int64)
        places[:length] = np.arange(start, start + length)
        parts.append(_rank_chunks(places, size, rank))
        start += length
    return np.concatenate(parts)


def gathered_order(filled: Sequence[int], size: int) -> np.ndarray:
    """int64 [sum(filled)]: where each token of the filled documents stands in the ranks' parts put one after another."""
    total = sum(filled)
    order = np.empty(total, np.int64)
    for rank in range(size):
        held = np.concatenate([_rank_chunks(np.arange(a, a + n), size, rank) for a, n in _spans(filled)])
        order[held] = np.arange(len(held)) + rank * (total // size)
    return order


def rank_chunks(filled: int, size: int, rank: int) -> list[tuple[int, int]]:
    """[start, end) of the pieces of one filled document that this rank holds, in order."""
    if size == 1:
        return [(0, filled)]
    chunk = filled // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def _rank_chunks(values: np.ndarray, size: int, rank: int) -> np.ndarray:
    return np.concatenate([values[start:end] for start, end in rank_chunks(len(values), size, rank)])


def _spans(lengths: Sequence[int]):
    start = 0
    for length in lengths:
        yield start, length
        start += length

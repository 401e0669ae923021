"""Packed rows as the engine takes them: one micro-batch is one row of T = rows x seq_length tokens.

Megatron-core's packed format (``qkv_format="thd"``): documents follow each other, ``cu_seqlens`` says where they begin,
attention and rotary positions restart at each. Every stage and every tensor-parallel rank builds the same micro-batch
from the same rows: nothing about packing travels between processes. A context-parallel rank builds its part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from cpt_mega.engine.context import FILLING, filled_lengths, rank_positions


class Row(Protocol):
    """What the engine needs of a packed row of S tokens (``cpt_mega.data.rows.PackedRow`` has it)."""

    ids: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]
    loss_mask: np.ndarray  # [S]
    doc_lengths: Sequence[int]  # sums to S


@dataclass(frozen=True)
class ContextPart:
    """Which part of each document a rank computes: ``rank`` of ``size`` context-parallel ranks.

    multiple: what this rank's number of tokens must be divisible by (for sequence parallelism, for FP8).
    """

    size: int = 1
    rank: int = 0
    multiple: int = 1


WHOLE = ContextPart()


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of some rows.

    Attributes:
        ids, labels, mask: [1, T / context-parallel size].
        lengths: of every document of every row, in order, filling included; they sum to T.
        positions: int64 [T / context-parallel size], where each token stands in the rows put one after another.
        row_tokens: how many of this rank's tokens belong to each row.
        bounds: int32 [documents + 1], where each document begins, and T.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    lengths: tuple[int, ...]
    positions: np.ndarray
    row_tokens: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], part: ContextPart = WHOLE, tokens: int | None = None) -> "MicroBatch":
        """Concatenates rows of equal length S; ``tokens`` is T where several micro-batches must have one size.

        The result is in pinned host memory where there is a GPU: ``to`` then waits for nothing.
        """
        rows_lengths = [[int(length) for length in row.doc_lengths] for row in rows]
        rows_positions = [rank_positions(lengths, part.size, part.rank) for lengths in rows_lengths]
        lengths = [n for row in rows_lengths for n in filled_lengths(row, part.size)]
        row_tokens = [len(positions) for positions in rows_positions]
        filler = (filled_tokens(rows, part) if tokens is None else tokens) - sum(lengths)
        if filler:  # one more document of nothing
            lengths.append(filler)
            row_tokens[-1] += filler // part.size
            rows_positions.append(np.full(filler // part.size, FILLING, np.int64))
        starts = np.cumsum([0] + [sum(x) for x in rows_lengths])
        positions = np.concatenate(
            [np.where(p == FILLING, FILLING, p + start) for p, start in zip(rows_positions, starts, strict=False)]
        )

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            values = np.concatenate([np.asarray(getattr(row, name)) for row in rows])
            if len(positions) != len(values) or part.size > 1:
                values = np.where(positions == FILLING, 0, values[positions])
            return torch.from_numpy(values).to(dtype).unsqueeze(0).pin_memory()

        return cls(
            joined("ids", torch.int64),
            joined("labels", torch.int64),
            joined("loss_mask", torch.float32),
            tuple(lengths),
            positions,
            tuple(row_tokens),
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cpu").pin_memory(),
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "labels", "mask", "bounds")
        }
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """T, filling included."""
        return sum(self.lengths)

    def packed_params(self) -> PackedSeqParams:
        """Where the documents lie, for core and Transformer Engine.

        max_seqlen is the longest document and never T: when the rotary table is exactly as long as the row, core's
        unfused rope stops restarting at documents without a word (megatron/core/models/common/embeddings/rope_utils.py).
        """
        longest = max(self.lengths)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.bounds,
            cu_seqlens_kv=self.bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def filled_tokens(rows: Sequence[Row], part: ContextPart) -> int:
    """T of a micro-batch of these rows: the tokens of all context-parallel ranks together."""
    total = sum(n for row in rows for n in filled_lengths([int(x) for x in row.doc_lengths], part.size))
    return total + -total % (part.multiple * (2 * part.size if part.size > 1 else 1))

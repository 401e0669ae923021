"""Packed rows as the engine takes them: one micro-batch is one row of T = rows x seq_length tokens.

Megatron-core's packed format (``qkv_format="thd"``): documents follow each other, ``cu_seqlens`` says where they begin,
attention and rotary positions restart at each. Every stage and every tensor-parallel rank builds the same micro-batch
from the same rows: nothing about packing travels between processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Row(Protocol):
    """What the engine needs of a packed row of S tokens (``cpt_mega.data.rows.PackedRow`` has it)."""

    ids: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]
    loss_mask: np.ndarray  # [S]
    doc_lengths: Sequence[int]  # sums to S


@dataclass(frozen=True)
class MicroBatch:
    """ids, labels, mask: [1, T]; lengths: of every document of every row, in order, summing to T; rows: how many."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    lengths: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "MicroBatch":
        """Concatenates rows of equal length S into one of T = len(rows) * S tokens."""

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            values = np.concatenate([np.asarray(getattr(row, name)) for row in rows])
            return torch.from_numpy(values).to(device=device, dtype=dtype).unsqueeze(0)

        lengths = tuple(int(length) for row in rows for length in row.doc_lengths)
        return cls(
            joined("ids", torch.int64),
            joined("labels", torch.int64),
            joined("loss_mask", torch.float32),
            lengths,
            len(rows),
        )

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return self.ids.size(1)

    def packed_params(self) -> PackedSeqParams:
        """Where the documents lie, for core and Transformer Engine.

        max_seqlen is the longest document and never T: when the rotary table is exactly as long as the row, core's
        unfused rope stops restarting at documents without a word (megatron/core/models/common/embeddings/rope_utils.py).
        """
        bounds = torch.tensor((0, *self.lengths), dtype=torch.int32, device=self.ids.device).cumsum(
            0, dtype=torch.int32
        )
        longest = max(self.lengths)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

"""Layers of the torch backend: a norm that sequence parallelism accepts and attention that knows documents.

Shapes: t tokens of all rows of a micro-batch, n query heads, g key/value groups, d head size (per tensor-parallel rank).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from cpt_mega.engine.context import gathered_order, rank_chunks


class HostNorm(torch.nn.Module):
    """RMSNorm over the last dimension.

    Its weight is marked as applied to a slice of the sequence, so that core's ``finalize_model_grads`` sums its gradient
    over the tensor-parallel ranks; core's own WrappedTorchNorm refuses sequence parallelism.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class HostAttention(torch.nn.Module):
    """Causal attention within each document of packed rows, by torch's SDPA a document at a time.

    A loop over documents is exact (a document's scores depend on nothing else in the row, bit for bit) and several times
    faster on a CPU than a block mask over the row. Under context parallelism each rank gathers the keys and values of all
    (core has context parallelism in Transformer Engine's attention alone; the order of tokens is the same there).
    Constructor and call are those of core's ``TEDotProductAttention``.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **unused,
    ):
        super().__init__()
        self.scale, self.sequence_parallel = softmax_scale, config.sequence_parallel
        self.cp_group, self.cp = pg_collection.cp, config.context_parallel_size
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # tokens seen, itself included
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """query [t, n, d], key and value [t, g, d] to [t, n * d]; boundaries from ``packed_seq_params.cu_seqlens_q``."""
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        if self.cp > 1:
            order = torch.from_numpy(gathered_order(lengths, self.cp))
            key, value = (self._gathered(x, order) for x in (key, value))
        mine = [length // self.cp for length in lengths]
        q, k, v = (
            x.transpose(0, 1).unsqueeze(0).split(sizes, dim=2)
            for x, sizes in ((query, mine), (key, lengths), (value, lengths))
        )
        with self._generator():
            documents = [self._attend_document(*document).transpose(1, 2) for document in zip(q, k, v, strict=True)]
        # SDPA's output lies in memory as [1, tokens, n, d]: joined that way it is copied once, one document not at all.
        joined = documents[0] if len(documents) == 1 else torch.cat(documents, dim=1)
        return joined.reshape(query.size(0), -1)

    def _gathered(self, part: Tensor, order: Tensor) -> Tensor:
        """[t, g, d] of each context-parallel rank to [cp * t, g, d] in document order; gradients are summed back."""
        return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=self.cp_group)[order]

    def _generator(self):
        """Dropout of heads that tensor-parallel ranks share out is drawn apart; under SP the whole block already is."""
        shared_out = self.dropout > 0.0 and self.training and not self.sequence_parallel
        return get_cuda_rng_tracker().fork() if shared_out else nullcontext()

    def _attend_document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, n, tokens of this rank, d] for one document; k and v hold all its tokens."""
        if self.cp == 1:
            return self._attend(q, k, v, 0)
        pieces = rank_chunks(k.size(2), self.cp, self.cp_group.rank())
        parts = zip(q.split([end - start for start, end in pieces], dim=2), pieces, strict=True)
        return torch.cat([self._attend(x, k[:, :, :end], v[:, :, :end], start) for x, (start, end) in parts], dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """q are the positions from ``start`` to the end of k."""
        mask = None
        if start or (self.window is not None and k.size(2) > self.window):
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(start)
            mask = mask if self.window is None else mask.triu(start + 1 - self.window)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
            dropout_p=self.dropout if self.training else 0.0,
        )

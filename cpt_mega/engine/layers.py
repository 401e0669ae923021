"""Layers of the torch backend: a norm that sequence parallelism accepts and attention that knows documents.

Shapes: t tokens of all rows of a micro-batch, n query heads, g key/value groups, d head size (per tensor-parallel rank).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


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
    faster on a CPU than a block mask over the row. Constructor and call are those of core's ``TEDotProductAttention``.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused,
    ):
        super().__init__()
        self.scale, self.sequence_parallel = softmax_scale, config.sequence_parallel
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
        q, k, v = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value))
        with self._generator():
            documents = [self._attend(*document) for document in zip(q, k, v, strict=True)]
        return torch.cat(documents, dim=2).squeeze(0).transpose(0, 1).reshape(query.size(0), -1)

    def _generator(self):
        """Dropout of heads that tensor-parallel ranks share out is drawn apart; under SP the whole block already is."""
        shared_out = self.dropout > 0.0 and self.training and not self.sequence_parallel
        return get_cuda_rng_tracker().fork() if shared_out else nullcontext()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.size(2)
        band = None
        if self.window is not None and tokens > self.window:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=band,
            is_causal=band is None,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
            dropout_p=self.dropout if self.training else 0.0,
        )

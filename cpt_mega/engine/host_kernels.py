"""Kernels for the host in the place of the fused ones that core has for CUDA, under the same contracts.

What core falls back to without them is written for reference or to be compiled: it copies whole gradients to scale them,
computes a sigmoid three times, and builds rotary tables anew in every layer, a document at a time.
"""

import weakref

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from cpt_mega.engine.context import rank_chunks


def install() -> None:
    """Puts the kernels where core looks for its own."""
    import megatron.core.fusions.fused_bias_swiglu as fused_swiglu
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = HostAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_TE_OPTIMIZER = HostAdam, True, True
    clip_grads.multi_tensor_scale_impl = scale_tensors
    fused_swiglu.swiglu, fused_swiglu.swiglu_back = swiglu, swiglu_back
    rope.fused_apply_rotary_pos_emb_thd = rotate_documents


class HostAdam(torch.optim.Optimizer):
    """AdamW under a fused Adam's contract: ``step`` in the group, state exactly ``exp_avg`` and ``exp_avg_sq``.

    Plain ``torch.optim.AdamW`` keeps ``step`` in the state, which breaks the distributed optimizer's checkpoints. The
    arithmetic is torch's own fused kernel for the CPU. Keyword arguments that only a fused kernel knows
    (``capturable`` in megatron-core 0.19) are accepted and have no meaning here.
    """

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, **gpu_only):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "bias_correction": True}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                self._update(group, params)

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        (adamw if self.adam_w_mode else adam)(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(group["step"] - 1)) for _ in params],  # the functional form adds one itself
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def scale_tensors(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """``amp_C.multi_tensor_scale``: the second list becomes the first times ``scale``."""
    sources, targets = tensor_lists
    if sources is targets:
        torch._foreach_mul_(targets, scale)
        return
    for source, target in zip(sources, targets, strict=True):
        torch.mul(source, scale, out=target)


def swiglu(inputs: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``inputs`` [..., gate and up]."""
    gate, up = inputs.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_back(grad: Tensor, inputs: Tensor) -> Tensor:
    """Its gradient to ``inputs``, bit for bit as autograd has it; each half is written where it belongs."""
    gate, up = inputs.chunk(2, dim=-1)
    result = torch.empty_like(inputs)
    to_gate, to_up = result.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=to_up)
    to_up.mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
    return result


def rotate_documents(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0, interleaved: bool = False
) -> Tensor:
    """Transformer Engine's rotary embedding of packed rows (``fused_apply_rotary_pos_emb_thd``).

    Args:
        t: [tokens of this context-parallel rank, heads, head_dim].
        cu_seqlens: int32 [documents + 1], where documents begin in the whole row.
        freqs: angles [positions, 1, 1, rotary_dim], both halves alike; what lies behind ``rotary_dim`` passes unchanged.
        interleaved: megatron-core 0.19 says it; no family here has it.
    """
    assert not interleaved, "pairs lie half a head apart in every family here"
    return _Rotation.apply(t, *_tables.of(cu_seqlens, freqs, cp_size, cp_rank, t.dtype))


class _Tables:
    """Cosines and sines [tokens, 1, rotary_dim / 2] of the row that was asked for last: all layers ask for the same."""

    def __init__(self):
        self._key, self._found = None, None

    def of(
        self, cu_seqlens: Tensor, freqs: Tensor, cp_size: int, cp_rank: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Arguments as ``rotate_documents`` has them; made anew when the row, the angles or the place are others."""
        place = (cp_size, cp_rank, dtype)
        if (
            self._key is None
            or self._key[0]() is not cu_seqlens
            or self._key[1]() is not freqs
            or self._key[2] != place
        ):
            angles = freqs[_positions(cu_seqlens, cp_size, cp_rank), 0, :, : freqs.size(-1) // 2]
            self._found = angles.cos().to(dtype), angles.sin().to(dtype)
            self._key = weakref.ref(cu_seqlens), weakref.ref(freqs), place
        return self._found


_tables = _Tables()


def _positions(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Position within its document of each token that this context-parallel rank holds."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if cp_size == 1:
        return torch.arange(int(cu_seqlens[-1])) - starts.repeat_interleave(lengths)
    pieces = (piece for length in lengths.tolist() for piece in rank_chunks(length, cp_size, cp_rank))
    return torch.cat([torch.arange(start, end) for start, end in pieces])


class _Rotation(torch.autograd.Function):
    """Turns pairs (i, i + rotary_dim / 2) by their angles; the gradient is turned back."""

    @staticmethod
    def forward(ctx, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(t, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(t: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = cos.size(-1)
    result = torch.empty(t.shape, dtype=t.dtype)
    first, second = t[..., :half], t[..., half : 2 * half]
    torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=result[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    result[..., 2 * half :] = t[..., 2 * half :]
    return result

"""A ``ModelShape`` as a megatron-core model on this process's mesh."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from cpt_mega.config.schema import Config
from cpt_mega.engine.backend import transformer_spec
from cpt_mega.engine.core_options import core_fields
from cpt_mega.engine.fast_paths import fast_fields, overlap_fields
from cpt_mega.engine.host import has_gpu
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.precision import precision_fields
from cpt_mega.errors import InputError
from cpt_mega.hf.shape import ModelShape

# What each value of train.recompute means in core's own fields.
_RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: Config, shape: ModelShape) -> TransformerConfig:
    """Core's own configuration for this model, layout and precision; ``core.*`` has the last word where it may speak."""
    fields = {
        **_shape_fields(config, shape),
        **_parallel_fields(config),
        **precision_fields(config.precision),
        **fast_fields(config.train.deterministic),
        "calculate_per_token_loss": True,
        # Weights are always restored, but core marks what is tensor-parallel while it initialises: without the mark the
        # gradient norm counts sharded weights on one rank only, and clipping goes wrong in silence.
        "perform_initialization": True,
        "use_cpu_initialization": not has_gpu(),
        "deterministic_mode": config.train.deterministic,
        **_RECOMPUTE[config.train.recompute],
    }
    try:
        return TransformerConfig(**{**fields, **core_fields(config.core, TransformerConfig)})
    except (ValueError, AssertionError) as error:  # core's own checks of what goes together
        if not config.core:
            raise
        raise InputError("core", config.core, f"core refuses it: {error}") from error


def _shape_fields(config: Config, shape: ModelShape) -> dict:
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": config.train.dropout,
        "attention_dropout": config.train.dropout,
        **_attention_fields(shape),
    }


def _parallel_fields(config: Config) -> dict:
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sp,
        # Interleaved stages exchange several tensors at once; batched, gloo matches them wrongly and in silence.
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        # gloo still reads a sent tensor when core frees it: wrong losses, silently.
        "deallocate_pipeline_outputs": has_gpu(),
    }


def _attention_fields(shape: ModelShape) -> dict:
    """What rope and window ask of attention, in core's fields.

    A rope type that multiplies cosines and sines by m (YaRN) scales query times key by m * m; said as a softmax scale
    it reaches every kernel, where core's own factor is dropped without a word by the fused rope of packed rows.
    """
    factor = shape.rope_factor
    fields = {} if factor == 1.0 else {"softmax_scale": factor * factor / math.sqrt(shape.head_dim)}
    if shape.sliding_window is not None:
        fields["window_size"] = (shape.sliding_window - 1, 0)  # core does not count the position itself
        fields["window_attn_skip_freq"] = [int(i not in shape.full_attention_layers) for i in range(shape.layers)]
        # The one way of Transformer Engine's that has windows over packed rows under context parallelism.
        fields["cp_comm_type"] = "a2a"
    return fields


def build_chunks(config: Config, shape: ModelShape, mesh: Mesh) -> list[GPTModel]:
    """This rank's part of the model: one chunk, or ``parallel.vpp`` of an interleaved pipeline, in the model's order.

    Weights are undefined until a checkpoint is loaded into them.
    """
    core, count = transformer_config(config, shape), config.parallel.vpp
    return [_build_chunk(core, shape, mesh, stage, count) for stage in range(count)]


def _build_chunk(core: TransformerConfig, shape: ModelShape, mesh: Mesh, stage: int, count: int) -> GPTModel:
    is_last, vp_stage = mesh.is_last_stage and stage == count - 1, stage if count > 1 else None
    model = GPTModel(
        config=core,
        transformer_layer_spec=transformer_spec(core, vp_stage),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=mesh.is_first_stage and stage == 0,
        post_process=is_last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        rotary_percent=shape.rope.partial,
        pg_collection=mesh.groups,
        vp_stage=vp_stage,
    )
    # The reference's own frequencies: exact for every rope type, where core hard-codes llama3's constants.
    frequencies = shape.inverse_frequencies()
    model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
    if is_last:
        _mask_padded_vocabulary(model, shape, mesh)
    return model.cuda()


def wrap_for_training(
    chunks: list[GPTModel], config: Config, arrived: Callable[[], None]
) -> list[DistributedDataParallel]:
    """The model under core's data parallelism, gradients accumulated and reduced in fp32.

    ``arrived`` is called in each step when this rank's gradients are ready to be reduced.
    """
    core = chunks[0].config
    options = ddp_config(config)

    def finalize(*args, **options):
        arrived()
        return finalize_model_grads(*args, **options)

    core.finalize_model_grads_func = finalize
    # As Megatron-LM has it: only the first chunk's gradients come last, where buckets could overlap with the backward pass.
    wrapped = [
        DistributedDataParallel(core, options, _in_precision(chunk), disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    _connect_overlap(core, options, wrapped)
    return wrapped


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Gradients accumulated and reduced in fp32, unless ``core.*`` says otherwise."""
    fields = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.train.distributed_optimizer,
        "check_for_nan_in_grad": False,  # the loop looks at loss and norm of each step
        **overlap_fields(config),
    }
    return DistributedDataParallelConfig(**{**fields, **core_fields(config.core, DistributedDataParallelConfig)})


def _connect_overlap(
    core: TransformerConfig, options: DistributedDataParallelConfig, chunks: list[DistributedDataParallel]
) -> None:
    """What core's schedules call when communication overlaps with computing (Megatron-LM, training.py)."""

    def calls(name: str):
        found = [getattr(chunk, name) for chunk in chunks]
        return found if len(chunks) > 1 else found[0]

    if options.overlap_grad_reduce:
        core.no_sync_func = calls("no_sync")
        if len(chunks) > 1:
            core.grad_sync_func = calls("start_grad_sync")
    if options.overlap_param_gather and options.align_param_gather:
        core.param_sync_func = calls("start_param_sync")


def wrap_for_scoring(chunks: list[GPTModel]) -> list[torch.nn.Module]:
    """The model as a forward pass alone, in the precision of training."""
    return [_in_precision(chunk).eval() for chunk in chunks]


def _in_precision(chunk: GPTModel) -> torch.nn.Module:
    return Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk


class _FillPadding(torch.autograd.Function):
    """Sets the logits of padded vocabulary rows to -inf in place, and their gradients to zero, without a copy."""

    @staticmethod
    def forward(ctx, logits: Tensor, real: int) -> Tensor:
        ctx.real = real
        ctx.mark_dirty(logits)
        logits[..., real:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The loss already gives exact zeros here; a softmax elsewhere (a distillation loss) might give NaN.
        grad = grad.clone() if grad._is_view() else grad
        grad[..., ctx.real :] = 0
        return grad, None


def _mask_padded_vocabulary(model: GPTModel, shape: ModelShape, mesh: Mesh) -> None:
    """Keeps padded rows out of the softmax: unmasked, they raise the loss (0.018 on a small vocabulary)."""
    share = shape.padded_vocab_size // mesh.tp
    real = min(max(shape.vocab_size - mesh.groups.tp.rank() * share, 0), share)
    if real == share:
        return

    def mask(module, inputs, outputs):
        logits, bias = outputs
        return _FillPadding.apply(logits, real), bias

    model.output_layer.register_forward_hook(mask)

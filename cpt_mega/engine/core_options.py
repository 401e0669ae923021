"""megatron-core's own switches, passed through under core's names (``core.overlap_param_gather: true``).

Core has some 250 fields, and most would change the model, the loss or the checkpoints without a word. So a switch passes
when it is listed here, after it was tried; any other is refused. One that two of core's configurations have is set in both,
as Megatron-LM's arguments are.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import get_type_hints

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cpt_mega.engine.host import has_gpu
from cpt_mega.errors import InputError

OWNERS = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)

# Speed and memory: the numbers stay the same (to rounding), so a run may be continued with other values.
_HARMLESS = frozenset(
    {
        "bias_activation_fusion",
        "apply_rope_fusion",
        "cross_entropy_loss_fusion",
        "cross_entropy_fusion_impl",
        "gradient_accumulation_fusion",
        "recompute_modules",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "bucket_size",
        "pad_buckets_for_high_nccl_busbw",
        "check_for_nan_in_grad",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    }
)
# What is computed changes: a run that goes on with another value must accept it by name.
_NUMERIC = frozenset(
    {
        "decoupled_lr",
        "decoupled_min_lr",
        "grad_reduce_in_fp32",
        "first_last_layers_bf16",
        "num_layers_at_start_in_bf16",
        "num_layers_at_end_in_bf16",
        "fp8_margin",
        "fp8_amax_history_len",
        "fp8_amax_compute_algo",
        "fp8_wgrad",
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        "use_precision_aware_optimizer",
        "store_param_remainders",
        "main_grads_dtype",
        "main_params_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
    }
)
# Only kernels of a GPU have them.
_GPU_ONLY = frozenset(
    {
        "gradient_accumulation_fusion",
        *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "pad_buckets_for_high_nccl_busbw"),
        *("use_precision_aware_optimizer", "store_param_remainders", "main_grads_dtype", "main_params_dtype"),
        *("exp_avg_dtype", "exp_avg_sq_dtype", "first_last_layers_bf16"),
        *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        *(name for name in _NUMERIC if name.startswith("fp8_")),
    }
)
# Where a user who knows core's name will find the option.
_OURS = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "window_size"), "the model's config.json"),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), "train.dropout"),
    **dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"), "train.recompute"),
    **dict.fromkeys(("fp16", "bf16", "params_dtype", "pipeline_dtype", "fp8", "fp8_recipe"), "precision"),
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sp",
    "deterministic_mode": "train.deterministic",
    "use_distributed_optimizer": "train.distributed_optimizer",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "clip_grad": "optimizer.clip_norm",
}
NUMERIC = tuple(f"core.{name}" for name in sorted(_NUMERIC))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def core_fields(switches: Mapping[str, object], owner: type) -> dict:
    """The switches that are fields of ``owner``, as values of their types."""
    hints = _hints(owner)
    return {name: _value(name, value, hints[name]) for name, value in switches.items() if name in hints}


def check_core_options(switches: Mapping[str, object]) -> None:
    """Raises InputError for a switch that does not pass through, or a value of another type."""
    for name, value in switches.items():
        if name in _OURS:
            raise InputError(f"core.{name}", value, f"is decided by {_OURS[name]}; set that instead")
        if name not in _HARMLESS | _NUMERIC:
            raise InputError(f"core.{name}", value, _not_passed(name))
        if name in _GPU_ONLY and not has_gpu():
            raise InputError(f"core.{name}", value, "is of kernels that only a GPU has; leave it out here")
    for owner in OWNERS:
        core_fields(switches, owner)


def _not_passed(name: str) -> str:
    free = sorted(_HARMLESS | _NUMERIC)
    close = difflib.get_close_matches(name, free, n=1)
    if close:
        return f"unknown; did you mean {close[0]!r}?"
    return f"is not among core's switches that pass through: {', '.join(free)}"


@cache
def _hints(owner: type) -> dict[str, object]:
    hints = get_type_hints(owner)
    return {field.name: hints[field.name] for field in fields(owner) if field.init}


def _value(name: str, value: object, hint: object) -> object:
    if hint is torch.dtype:
        if value not in _DTYPES:
            raise InputError(f"core.{name}", value, f"must be one of {', '.join(_DTYPES)}")
        return _DTYPES[value]
    plain = list(value) if isinstance(value, tuple) else value
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(plain)
    except ValidationError as error:
        raise InputError(f"core.{name}", value, error.errors()[0]["msg"].lower()) from error

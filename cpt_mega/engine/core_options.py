"""megatron-core's own switches, passed through under core's names (``core.overlap_param_gather: true``).

A name may be a field of any of the three configurations that the engine builds; a field that two of them have is set in
both, as Megatron-LM's arguments are. What the trainer's own options say is not said twice: those fields are refused.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import get_type_hints

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cpt_mega.errors import InputError

OWNERS = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)

_SHAPE = "the model's config.json"
# Fields that have an option of their own, or that the model decides.
_OURS = {
    **dict.fromkeys(
        ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"), _SHAPE
    ),
    **dict.fromkeys(("kv_channels", "normalization", "layernorm_epsilon", "gated_linear_unit", "qk_layernorm"), _SHAPE),
    **dict.fromkeys(("activation_func", "add_bias_linear", "add_qkv_bias", "softmax_scale"), _SHAPE),
    **dict.fromkeys(("window_size", "window_attn_skip_freq", "rotary_interleaved", "num_moe_experts"), _SHAPE),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), "train.dropout"),
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sp",
    **dict.fromkeys(("fp16", "bf16", "params_dtype", "pipeline_dtype", "fp8", "fp8_recipe"), "precision"),
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
# What the engine relies on; another value would break the loss, the checkpoints or the restore without a word.
_FIXED = {
    "calculate_per_token_loss": "the loss is a mean over the global batch's targets",
    "perform_initialization": "core marks tensor-parallel weights while it initialises",
    "use_cpu_initialization": "weights are always loaded",
    "optimizer": "checkpoints hold Adam's moments",
    "variable_seq_lengths": "micro-batches of a step have one size",
    "use_megatron_fsdp": "its checkpoints have another form",
    "use_custom_fsdp": "its checkpoints have another form",
    "average_in_collective": "the loss is a mean over the global batch's targets",
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def core_fields(switches: Mapping[str, object], owner: type) -> dict:
    """The switches that are fields of ``owner``, as values of their types."""
    hints = _hints(owner)
    return {name: _value(name, value, hints[name]) for name, value in switches.items() if name in hints}


def check_core_options(switches: Mapping[str, object]) -> None:
    """Raises InputError for a name core does not have, one that is not free, or a value of another type."""
    known = {name for owner in OWNERS for name in _hints(owner)}
    for name, value in switches.items():
        if name in _OURS:
            raise InputError(f"core.{name}", value, f"is decided by {_OURS[name]}; set that instead")
        if name in _FIXED:
            raise InputError(f"core.{name}", value, f"cannot be changed here: {_FIXED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"core.{name}", value, f"is no field of core's configurations{fix}")
    for owner in OWNERS:
        core_fields(switches, owner)


@cache
def _hints(owner: type) -> dict[str, object]:
    hints = get_type_hints(owner)
    return {field.name: hints[field.name] for field in fields(owner) if field.init}


def _value(name: str, value: object, hint: object) -> object:
    if hint is torch.dtype:
        if value not in _DTYPES:
            raise InputError(f"core.{name}", value, f"must be one of {', '.join(_DTYPES)}")
        return _DTYPES[value]
    if "Callable" in str(hint) or hint is Callable:
        raise InputError(f"core.{name}", value, "is a function, which no configuration file can hold")
    plain = list(value) if isinstance(value, tuple) else value
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(plain)
    except ValidationError as error:
        raise InputError(f"core.{name}", value, error.errors()[0]["msg"].lower()) from error

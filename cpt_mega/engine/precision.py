"""Named precisions in core's own fields, and what the device must have for each.

FP8 recipes are Transformer Engine's: weights stay bf16 with fp32 masters, matrix products of linear layers run in FP8.
``core.first_last_layers_bf16: true`` (with ``num_layers_at_start_in_bf16`` and ``_at_end_``) leaves the ends in bf16.
"""

import torch

from cpt_mega.config.schema import Config
from cpt_mega.engine.host import has_gpu
from cpt_mega.errors import InputError

# Core's fields by name. Sources: Transformer Engine's common/recipe, NVIDIA's published settings for each recipe;
# blockwise is DeepSeek-V3's (arXiv 2412.19437), mxfp8 the OCP microscaling format.
_FP8 = {
    "fp8-delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "fp8-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
# Tokens of a rank must be a multiple of this: megatron/core/fp8_utils.py, get_fp8_align_size.
_ALIGNMENT = {"fp8-delayed": 16, "fp8-tensorwise": 16, "fp8-blockwise": 16, "mxfp8": 32}
# Transformer Engine's own answer to whether this device can.
_SUPPORT = {
    "fp8-delayed": "is_fp8_available",
    "fp8-tensorwise": "is_fp8_available",
    "fp8-blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def is_fp8(precision: str) -> bool:
    return precision in _FP8


def model_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def precision_fields(precision: str) -> dict:
    """TransformerConfig's fields for a precision."""
    dtype = model_dtype(precision)
    half = dtype == torch.bfloat16
    return {"bf16": half, "params_dtype": dtype, "pipeline_dtype": dtype, **_FP8.get(precision, {})}


def token_multiple(precision: str) -> int:
    """What the number of tokens of a rank must be divisible by."""
    return _ALIGNMENT.get(precision, 1)


def check_precision(config: Config) -> None:
    """Raises InputError when this device cannot compute in the precision that is asked for."""
    if not is_fp8(config.precision):
        return
    if not has_gpu():
        raise InputError("precision", config.precision, "needs an NVIDIA GPU with FP8; use bf16 or fp32 here")
    available, why = _device_answer(_SUPPORT[config.precision])
    if not available:
        raise InputError("precision", config.precision, f"this machine cannot: {why}; use bf16")


def _device_answer(question: str) -> tuple[bool, str]:
    """Transformer Engine's own answer; the module was renamed in 2.9."""
    try:
        try:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager
        except ImportError:
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    except ImportError as error:
        return False, f"Transformer Engine cannot be imported ({error})"
    return getattr(FP8GlobalStateManager, question)()

"""Which layers a model is made of: Transformer Engine's on a GPU, the torch backend's elsewhere.

Both carry the same names in a checkpoint: the local spec's own renaming maps its two norms onto Transformer Engine's
fused ones, so a file written on one is read on the other.
"""

import copy

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from cpt_mega.engine.host import has_gpu
from cpt_mega.engine.layers import HostAttention, HostNorm
from cpt_mega.errors import InputError


def transformer_spec(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """What GPTModel takes as ``transformer_layer_spec`` for one chunk of this stage.

    Raises InputError on a GPU without Transformer Engine.
    """
    if has_gpu():
        return _transformer_engine_spec(config.qk_layernorm)
    layers = [_host_layer_spec(config.qk_layernorm)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    # A bare layer spec would give the final norm core's own class, which refuses sequence parallelism.
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=HostNorm)


def _transformer_engine_spec(qk_norm: bool) -> ModuleSpec:
    if not gpt_layer_specs.HAVE_TE:
        raise InputError("environment", "CUDA without Transformer Engine", "install transformer-engine[pytorch]")
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)


def _host_layer_spec(qk_norm: bool) -> ModuleSpec:
    spec = copy.deepcopy(gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm"))
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = HostNorm
    attention = layer.self_attention.submodules
    attention.core_attention = HostAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = HostNorm
    return spec

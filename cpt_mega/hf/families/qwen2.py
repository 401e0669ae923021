"""Qwen2 and Qwen2.5: Llama with biases on query, key and value.

Source: ``transformers/models/qwen2``. Sliding windows are refused; the window's other fields mean nothing without it.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.families import llama
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.tensor_map import Rule


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Qwen2."""
    reader.only("use_sliding_window", False)
    reader.only("use_mrope", False)
    reader.unused("sliding_window", "max_window_layers")
    shape = llama.read_decoder(reader, "qwen2", qkv_bias=True)
    reader.layer_types(shape.layers, "full_attention")
    return shape


def tensor_rules(shape: ModelShape) -> list[Rule]:
    """Llama's tensors and the three biases, which core holds as one."""
    return [*llama.tensor_rules(shape), llama.qkv_rule(shape, "bias", ())]

"""Qwen3 (dense): Llama with an RMSNorm over each head of query and key; some layers may have a sliding window.

Source: ``transformers/models/qwen3``.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.families import llama, qwen2
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.tensor_map import Rule


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Qwen3; biases are refused."""
    reader.only("attention_bias", False)
    return llama.read_decoder(reader, "qwen3", head_dim=128, qk_norm=True, **qwen2.read_windows(reader))


def tensor_rules(shape: ModelShape) -> list[Rule]:
    """Llama's tensors and the two norms of a head, [head_dim]."""
    norms = [
        llama.stacked(
            shape, f"self_attention.{part}_layernorm.weight", {f"self_attn.{part}_norm.weight": (shape.head_dim,)}
        )
        for part in "qk"
    ]
    return [*llama.tensor_rules(shape), *norms]

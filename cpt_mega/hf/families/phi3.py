"""Phi-3: Llama with fused projections, a sliding window over all layers, and rotary embedding of a part of each head.

Source: ``transformers/models/phi3``. The long-context variants (``longrope``) are refused by their rope type.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.families import llama
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.tensor_map import Rule


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Phi-3; dropout is refused."""
    reader.only("resid_pdrop", 0)
    reader.only("embd_pdrop", 0)
    reader.only("attention_bias", False)
    reader.unused("original_max_position_embeddings")  # of longrope alone
    heads = reader.size("num_attention_heads")
    rope = reader.rope(partial=True, types=("default",))
    window = reader.window(None)
    return llama.read_decoder(reader, "phi3", kv_heads=heads, norm_eps=1e-5, rope=rope, sliding_window=window)


def tensor_rules(shape: ModelShape) -> list[Rule]:
    """As Llama, with query, key and value in one tensor, and gate and up in another."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return [
        *llama.decoder_rules(shape),
        llama.qkv_rule(shape, "weight", (hidden,), parts=("qkv",)),
        llama.stacked(shape, "mlp.linear_fc1.weight", {"mlp.gate_up_proj.weight": (2 * ffn, hidden)}),
    ]

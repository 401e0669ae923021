"""Llama 1 to 3.3 and models of the same layout: RMSNorm, SwiGLU, rotary embedding, grouped queries, no biases.

Source: ``transformers/models/llama``.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.rope import RopeShape
from cpt_mega.hf.shape import MOST_HEAD_DIM, MOST_LAYERS, ModelShape
from cpt_mega.hf.tensor_map import Direct, PaddedVocab, QkvGroups, Rule, StackedLayers

# Files of transformers before 4.32 carry the frequencies of the rotary embedding.
DERIVED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Llama; biases and dropout are refused."""
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    reader.only("pretraining_tp", 1)
    return read_decoder(reader, "llama", kv_heads=reader.size("num_attention_heads"))


def read_decoder(
    reader: ConfigReader,
    family: str,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope: RopeShape | None = None,
    **switches: object,
) -> ModelShape:
    """The fields that Llama shares with later families.

    Args:
        kv_heads: what transformers takes when the config does not say; None: the config must.
        head_dim: likewise; None: hidden_size / heads.
        norm_eps: likewise.
        rope: where the family reads its own.
        switches: fields of ModelShape that only this family sets.
    """
    reader.only("is_encoder_decoder", False)
    reader.only("hidden_act", "silu")
    reader.only("attention_dropout", 0)
    hidden_size, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    return ModelShape(
        family=family,
        layers=reader.size("num_hidden_layers", most=MOST_LAYERS),
        hidden_size=hidden_size,
        ffn_hidden_size=reader.size("intermediate_size"),
        heads=heads,
        kv_heads=reader.size("num_key_value_heads", kv_heads),
        head_dim=reader.size("head_dim", head_dim or hidden_size // heads, most=MOST_HEAD_DIM),
        vocab_size=reader.size("vocab_size"),
        max_positions=reader.size("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps", norm_eps),
        rope=rope or reader.rope(),
        tied_embeddings=reader.flag("tie_word_embeddings", False),
        **switches,
    )


def tensor_rules(shape: ModelShape) -> list[Rule]:
    """Every tensor of a Llama of this shape."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    gate_and_up = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    return [
        *decoder_rules(shape),
        qkv_rule(shape, "weight", (hidden,)),
        stacked(shape, "mlp.linear_fc1.weight", gate_and_up),
    ]


def stacked(shape: ModelShape, key: str, parts: dict[str, tuple[int, ...]]) -> StackedLayers:
    """One core tensor for all layers, of the HF tensors ``model.layers.N.<part>``, with their shapes."""
    names = {f"model.layers.{{layer}}.{name}": size for name, size in parts.items()}
    return StackedLayers(f"decoder.layers.{key}", shape.layers, names)


def decoder_rules(shape: ModelShape) -> list[Rule]:
    """What every decoder of this kind has alike: all but the projections that some families fuse.

    Norms stand under the names that Transformer Engine's fused layers use.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    rules = [
        PaddedVocab(
            "embedding.word_embeddings.weight",
            "model.embed_tokens.weight",
            (shape.vocab_size, hidden),
            shape.padded_vocab_size,
        ),
        stacked(shape, "self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (hidden,)}),
        stacked(
            shape,
            "self_attention.linear_proj.weight",
            {"self_attn.o_proj.weight": (hidden, shape.heads * shape.head_dim)},
        ),
        stacked(shape, "mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (hidden,)}),
        stacked(shape, "mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, ffn)}),
        Direct("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)),
    ]
    if not shape.tied_embeddings:
        size = (shape.vocab_size, hidden)
        rules.append(PaddedVocab("output_layer.weight", "lm_head.weight", size, shape.padded_vocab_size))
    return rules


def qkv_rule(
    shape: ModelShape, kind: str, columns: tuple[int, ...], parts: tuple[str, ...] = ("q", "k", "v")
) -> QkvGroups:
    """Query, key and value: ``kind`` is weight (columns = (hidden_size,)) or bias (columns = ())."""
    return QkvGroups(
        key=f"decoder.layers.self_attention.linear_qkv.{kind}",
        layers=shape.layers,
        names=tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}" for part in parts),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        columns=columns,
    )

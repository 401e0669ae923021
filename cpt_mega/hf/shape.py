"""``ModelShape``: everything the engine must know to build a model, in the field's words, whatever its family."""

import math
from dataclasses import MISSING, asdict, dataclass, fields

from cpt_mega.errors import InputError
from cpt_mega.hf.rope import RopeShape

# The embedding is padded to a multiple of this whatever the layout, so that one model has one set of shapes: core
# would otherwise load a 512-row embedding into 640 rows without a word. Any power-of-two TP up to 128 divides it.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a decoder-only model. Head counts are heads, sizes are elements.

    Attributes:
        qk_norm: RMSNorm over each head of query and key, before they turn.
        sliding_window: tokens that a position sees, itself included; None: all before it.
        full_attention_layers: layers (from 0) that see everything although there is a window.
    """

    family: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: RopeShape
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as the engine holds it, [padded_vocab_size, hidden_size]."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def inverse_frequencies(self):
        """Inverse frequencies of the rotary embedding, float32 tensor of shape [rotary_dim / 2]."""
        return self.rope.frequencies(self.head_dim, self.max_positions)[0]

    @property
    def rope_factor(self) -> float:
        """What the rotary embedding multiplies query and key by."""
        return self.rope.frequencies(self.head_dim, self.max_positions)[1]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "ModelShape":
        """Raises InputError when a field is missing or unknown; a switch that an older file lacks was off."""
        known = {f.name for f in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        if not isinstance(value, dict) or not needed <= set(value) <= known:
            wrong = sorted((needed - set(value)) | (set(value) - known)) if isinstance(value, dict) else value
            raise InputError("model.json", wrong, "fields missing or unknown; import the model again")
        layers = tuple(value.get("full_attention_layers", ()))
        return cls(**{**value, "rope": RopeShape(**value["rope"]), "full_attention_layers": layers})

"""``ModelShape``: everything the engine must know to build a model, in the field's words, whatever its family."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated

from cpt_mega.errors import InputError
from cpt_mega.hf.rope import RopeShape
from cpt_mega.json_types import Range, type_problem

# The embedding is padded to a multiple of this whatever the layout, so that one model has one set of shapes: core
# would otherwise load a 512-row embedding into 640 rows without a word. Any power-of-two TP up to 128 divides it.
VOCAB_MULTIPLE = 128
# Beyond these a file does not mean what it says: core counts in int32, and there is an entry of the map for each layer.
MOST_ELEMENTS, MOST_LAYERS, MOST_HEAD_DIM = 2**31 - 1, 10_000, 2**16
Size = Annotated[int, Range(1, MOST_ELEMENTS)]


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a decoder-only model. Head counts are heads, sizes are elements.

    Attributes:
        qk_norm: RMSNorm over each head of query and key, before they turn.
        sliding_window: tokens that a position sees, itself included; None: all before it.
        full_attention_layers: layers (from 0) that see everything although there is a window.
    """

    family: str
    layers: Annotated[int, Range(1, MOST_LAYERS)]
    hidden_size: Size
    ffn_hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Annotated[int, Range(1, MOST_HEAD_DIM)]
    vocab_size: Size
    max_positions: Size
    norm_eps: float
    rope: RopeShape
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: Size | None = None
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

    @property
    def contradiction(self) -> tuple[str, object, str] | None:
        """The field, its value and what is wrong with it, where sizes do not go together."""
        if self.heads % self.kv_heads:
            return "kv_heads", self.kv_heads, f"must divide {self.heads} query heads"
        rotary = self.rope.rotary_dim(self.head_dim)
        if rotary % 2 or not rotary:
            what = f"head_dim {self.head_dim} x partial_rotary_factor {self.rope.partial}"
            return "head_dim", what, "must be an even number: rotary embedding turns pairs"
        return None

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "ModelShape":
        """Raises InputError for a field that is missing, unknown or cannot be; a switch that an older file lacks was off."""
        problem = type_problem(value, cls)
        if problem is not None:
            raise InputError("model.json", problem, "import the model again")
        layers = tuple(value.get("full_attention_layers", ()))
        shape = cls(**{**value, "rope": RopeShape.from_json(value["rope"]), "full_attention_layers": layers})
        if shape.contradiction is not None:
            field, wrong, fix = shape.contradiction
            raise InputError(f"model.json {field}", wrong, fix)
        return shape

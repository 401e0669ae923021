"""``ModelShape``: everything the engine must know to build a model, in the field's words, whatever its family."""

import math
from dataclasses import asdict, dataclass, field, fields

from cpt_mega.errors import InputError

# The embedding is padded to a multiple of this whatever the layout, so that one model has one set of shapes: core
# would otherwise load a 512-row embedding into 640 rows without a word. Any power-of-two TP up to 128 divides it.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class RopeShape:
    """Rotary embedding. ``parameters`` holds what the type needs beyond theta, under Hugging Face's names."""

    theta: float
    type: str = "default"
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a decoder-only model. Head counts are heads, sizes are elements."""

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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as the engine holds it, [padded_vocab_size, hidden_size]."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "ModelShape":
        """Raises InputError when a field is missing or unknown."""
        known = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or set(value) != known:
            wrong = sorted(set(value) ^ known) if isinstance(value, dict) else value
            raise InputError("model.json", wrong, "fields missing or unknown; import the model again")
        return cls(**{**value, "rope": RopeShape(**value["rope"])})

    def inverse_frequencies(self):
        """Inverse frequencies of the rotary embedding, float32 tensor of shape [head_dim / 2].

        Other types than "default" come from ``transformers.modeling_rope_utils``, the reference: megatron-core
        hard-codes the constants of llama3 scaling.
        """
        import torch

        if self.rope.type == "default":
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
            return 1.0 / (self.rope.theta**steps)
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
        )
        # transformers 4.x reads the first two, 5.x the third.
        config.rope_theta = self.rope.theta
        config.rope_scaling = {"rope_type": self.rope.type, **self.rope.parameters}
        config.rope_parameters = {"rope_theta": self.rope.theta, **config.rope_scaling}
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS[self.rope.type](config, device="cpu")
        if attention_factor != 1.0:
            raise InputError("rope_type", self.rope.type, "scales attention, which the engine does not do yet")
        return frequencies.float()

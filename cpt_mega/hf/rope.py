"""Rotary embeddings: how ``config.json`` spells them, and the frequencies that each type has.

Source of every type: ``transformers.modeling_rope_utils``, the reference. megatron-core hard-codes the constants of
llama3 scaling, so the engine takes its frequencies from here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cpt_mega.errors import InputError
from cpt_mega.json_types import type_problem

THETA = 10000.0  # what transformers takes when a config has none

_YARN = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    }
)
# For each type, what it must come with and what it may come with beyond theta, under Hugging Face's names.
TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "yarn": (frozenset({"factor"}), _YARN),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}
# Types that change with the length of what is read, and only beyond the model's positions, where no row reaches.
_BY_LENGTH = ("dynamic",)


@dataclass(frozen=True)
class RopeShape:
    """Rotary embedding of the first ``partial`` of each head. ``parameters``: what the type needs beyond theta."""

    theta: float
    type: str = "default"
    parameters: dict = field(default_factory=dict)
    partial: float = 1.0

    @classmethod
    def from_json(cls, value: dict) -> "RopeShape":
        """Of ``asdict``'s values, whose types are right. Raises InputError for a rotary embedding that there is not."""
        given = cls(**value)
        return _one_spelling("rope", {"rope_type": given.type, **given.parameters}, given.theta, given.partial)

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that turn."""
        return int(head_dim * self.partial)

    def frequencies(self, head_dim: int, max_positions: int):
        """Inverse frequencies (float32 tensor [rotary_dim / 2]) and what cosines and sines are multiplied by.

        Rows are at most ``max_positions`` long, so a type that changes beyond that is the default one.
        """
        import torch

        dim = self.rotary_dim(head_dim)
        if self.type == "default" or self.type in _BY_LENGTH:
            steps = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
            return 1.0 / (self.theta**steps), 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=max_positions
        )
        # transformers 4.x reads the first two, 5.x the third.
        config.rope_theta = self.theta
        config.rope_scaling = {"rope_type": self.type, **self.parameters}
        config.rope_parameters = {"rope_theta": self.theta, **config.rope_scaling}
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS[self.type](config, device="cpu")
        return frequencies.float(), float(attention_factor)

    def spellings(self) -> dict:
        """The fields of ``config.json`` that say this, for transformers 4 (three of them) and 5."""
        scaling = None if self.type == "default" else {"rope_type": self.type, **self.parameters}
        part = {} if self.partial == 1.0 else {"partial_rotary_factor": self.partial}
        new = {"rope_theta": self.theta, "rope_type": self.type, **self.parameters, **part}
        return {"rope_theta": self.theta, "rope_scaling": scaling, "rope_parameters": new, **part}


def read_rope(config: dict) -> RopeShape:
    """The rotary embedding of a config in either spelling: ``rope_theta`` with ``rope_scaling`` (transformers 4), or
    ``rope_parameters`` (transformers 5). When both stand there they must agree. Raises InputError."""
    old, new = (_object(key, config.get(key)) for key in ("rope_scaling", "rope_parameters"))
    theta = _first(config.get("rope_theta"), new.get("rope_theta"), old.get("rope_theta"), THETA)
    partial = _first(*(place.get("partial_rotary_factor") for place in (config, new, old)), 1.0)
    plain = _one_spelling("rope_theta", {}, theta, partial)
    given = [
        _one_spelling(key, fields, theta, partial)
        for key, fields in (("rope_scaling", old), ("rope_parameters", new))
        if fields
    ]
    if any(shape != given[0] or (shape.theta, shape.partial) != (plain.theta, plain.partial) for shape in given):
        raise InputError("config.json: rope_parameters", new, "contradicts rope_theta or rope_scaling; keep one")
    return given[0] if given else plain


def _object(key: str, value: object) -> dict:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"config.json: {key}", value, "must be an object or null")
    return value or {}


def _first(*values: object) -> object:
    return next(value for value in values if value is not None)


def _one_spelling(field: str, fields: dict, theta: object, partial: object) -> RopeShape:
    """One spelling, with every parameter that its type needs and none that it does not know."""
    fields = {key: value for key, value in fields.items() if value is not None}
    theta, partial = fields.pop("rope_theta", theta), fields.pop("partial_rotary_factor", partial)
    kinds = [kind for key in ("rope_type", "type") if (kind := fields.pop(key, None)) is not None]
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in TYPES or kinds[1:] not in ([], [kind]):
        raise InputError(f"config.json: {field}.rope_type", kinds, f"supported: one of {', '.join(TYPES)}")
    _expect_parameters(field, kind, fields)
    numbers = [value for name, value in fields.items() if name != "truncate"]
    if not isinstance(fields.get("truncate", True), bool):
        raise InputError(f"config.json: {field}.truncate", fields["truncate"], "must be true or false")
    if not is_positive(theta) or not all(map(is_positive, numbers)):
        values = {"rope_theta": theta, **fields}
        raise InputError(f"config.json: {field}", values, "every value must be a positive number")
    if not is_positive(partial) or partial > 1:
        raise InputError("config.json: partial_rotary_factor", partial, "must be above 0 and at most 1")
    return RopeShape(float(theta), kind, fields, float(partial))


def _expect_parameters(field: str, kind: str, given: Iterable[str]) -> None:
    required, optional = TYPES[kind]
    wrong = sorted((required - set(given)) | (set(given) - required - optional))
    if wrong:
        needs = ", ".join(sorted(required)) or "nothing but rope_theta"
        may = f", optionally {', '.join(sorted(optional))}" if optional else ""
        raise InputError(f"config.json: {field}", wrong, f"missing or unknown; type {kind} takes {needs}{may}")


def is_positive(value: object) -> bool:
    """Whether a value of a JSON file is a finite number above zero."""
    return type_problem(value, float) is None and 0 < value < float("inf")

"""Reading ``config.json`` without guessing: every field is understood, known to change nothing, or refused by name."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from cpt_mega.errors import InputError
from cpt_mega.hf.shape import RopeShape

# Bookkeeping of transformers: nothing here changes the value of a forward pass over given token ids.
# fmt: off
BOOKKEEPING = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_name_or_path",
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "max_length", "model_type", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})
# fmt: on

# What each accepted type of rotary embedding must come with, under Hugging Face's names.
ROPE_PARAMETERS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
ROPE_THETA = 10000.0  # what transformers takes when a config has none


def read_config(hf_dir: str | Path) -> dict:
    """``config.json`` of an HF folder. Raises InputError when it is missing or is not a JSON object."""
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("hf", str(path), f"cannot be read ({error}); name a Hugging Face model folder") from error
    except ValueError as error:
        raise InputError("hf", str(path), f"is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError("hf", str(path), "must hold a JSON object")
    return config


class ConfigReader:
    """Takes fields out of a config one by one; ``finish`` refuses what nobody took.

    ``null`` counts as absent, as it does in transformers. Every method raises InputError on a value it does not accept.
    """

    def __init__(self, config: dict):
        self._config = config
        self._taken = set(BOOKKEEPING)

    def _take(self, key: str, default: object, accepted: Callable[[object], bool], fix: str):
        self._taken.add(key)
        value = self._config.get(key)
        if value is None:
            value = default
        if not accepted(value):
            raise InputError(f"config.json: {key}", value, fix)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return self._take(key, default, lambda v: type(v) is int and v > 0, "must be a positive integer")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return float(self._take(key, default, _is_positive, "must be a positive number"))

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self._take(key, default, lambda v: isinstance(v, bool), "must be true or false")

    def only(self, key: str, accepted: object) -> None:
        """The one value that the engine computes; also taken when absent."""
        fix = f"only {json.dumps(accepted)} is supported for this family"
        self._take(key, accepted, lambda v: v == accepted and isinstance(v, bool) == isinstance(accepted, bool), fix)

    def unused(self, *keys: str) -> None:
        """Fields that have no effect given the others."""
        self._taken.update(keys)

    def layer_types(self, layers: int, accepted: str) -> None:
        """``layer_types``: absent, or the accepted type for each layer."""
        fix = f"only {accepted!r} in every one of {layers} layers is supported for this family"
        self._take("layer_types", [accepted] * layers, lambda v: v == [accepted] * layers, fix)

    def rope(self) -> RopeShape:
        """The rotary embedding in either spelling: ``rope_theta`` with ``rope_scaling`` (transformers 4), or
        ``rope_parameters`` (transformers 5). When both stand there they must agree."""
        old = self._take("rope_scaling", {}, lambda v: isinstance(v, dict), "must be an object or null")
        new = self._take("rope_parameters", {}, lambda v: isinstance(v, dict), "must be an object or null")
        theta = self.number("rope_theta", new.get("rope_theta", old.get("rope_theta", ROPE_THETA)))
        spelled = [_rope("rope_scaling", old, theta), _rope("rope_parameters", new, theta)]
        given = [shape for shape, fields in zip(spelled, (old, new), strict=True) if fields]
        if any(shape != given[0] or shape.theta != theta for shape in given):
            raise InputError("config.json: rope_parameters", new, "contradicts rope_theta or rope_scaling; keep one")
        return given[0] if given else RopeShape(theta)

    def finish(self) -> None:
        """Raises InputError naming a field that nothing took: its value might change the model's mathematics."""
        unknown = sorted(key for key, value in self._config.items() if key not in self._taken and value is not None)
        if unknown:
            values = {key: self._config[key] for key in unknown}
            fix = "not known for this family; remove the field only if it does not change the model"
            raise InputError(f"config.json: {', '.join(unknown)}", values, fix)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _rope(field: str, fields: dict, theta: float) -> RopeShape:
    """One spelling of the rotary embedding, with every parameter of its type and no other."""
    fields = dict(fields)
    theta = fields.pop("rope_theta", theta)
    kinds = {kind for key in ("rope_type", "type") if (kind := fields.pop(key, None)) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ROPE_PARAMETERS:
        raise InputError(f"config.json: {field}.rope_type", kind, f"supported: {', '.join(ROPE_PARAMETERS)}")
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config.json: {field}.partial_rotary_factor", "below 1", "only 1.0 is supported")
    _expect_parameters(field, kind, fields)
    if not _is_positive(theta) or not all(map(_is_positive, fields.values())):
        raise InputError(
            f"config.json: {field}", {"rope_theta": theta, **fields}, "every value must be a positive number"
        )
    return RopeShape(float(theta), kind, fields)


def _expect_parameters(field: str, kind: str, given: Iterable[str]) -> None:
    wrong = sorted(set(given) ^ ROPE_PARAMETERS[kind])
    if wrong:
        needs = ", ".join(sorted(ROPE_PARAMETERS[kind])) or "nothing but rope_theta"
        raise InputError(f"config.json: {field}", wrong, f"missing or unknown; type {kind} takes {needs}")


def with_both_spellings(config: dict, rope: RopeShape, dtype: str) -> dict:
    """A config that transformers 4 and 5 read alike: every field as it was, the other generation's spelling added.

    transformers 4.57 misreads a config of 5 without a word, and the other way round: each falls back to defaults
    for the fields it does not find. ``dtype`` and ``torch_dtype`` say what the tensors are.
    """
    scaling = None if rope.type == "default" else {"rope_type": rope.type, **rope.parameters}
    added = {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.type, **rope.parameters},
    }
    missing = {key: value for key, value in added.items() if config.get(key) is None}
    return {**config, **missing, "dtype": dtype, "torch_dtype": dtype}

"""Reading ``config.json`` without guessing: every field is understood, known to change nothing, or refused by name."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from cpt_mega.errors import InputError
from cpt_mega.hf.rope import TYPES, RopeShape, is_positive, read_rope
from cpt_mega.hf.shape import MOST_ELEMENTS
from cpt_mega.lineage import read_json

# Bookkeeping of transformers: nothing here changes the value of a forward pass over given token ids.
# fmt: off
BOOKKEEPING = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_name_or_path",
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "max_length", "model_type", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})
# fmt: on


def read_config(hf_dir: str | Path) -> dict:
    """``config.json`` of an HF folder. Raises InputError when it is missing or is not a JSON object."""
    path = Path(hf_dir) / "config.json"
    try:
        config = read_json(path)
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

    def size(self, key: str, default: int | None = None, most: int = MOST_ELEMENTS) -> int:
        """A positive integer, and not absurdly large."""
        fix = f"must be a positive integer of at most {most}"
        return self._take(key, default, lambda v: _is_size(v) and v <= most, fix)

    def count(self, key: str, default: int) -> int:
        """A whole number, zero included."""
        return self._take(key, default, lambda v: type(v) is int and 0 <= v <= MOST_ELEMENTS, "must be a whole number")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return float(self._take(key, default, is_positive, "must be a positive number"))

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

    def window(self, default: int | None) -> int | None:
        """``sliding_window`` in tokens. Here null and absent differ, as they do in transformers: null is no window."""
        self.unused("sliding_window")
        value = self._config.get("sliding_window", default)
        if value is not None and not _is_size(value):
            raise InputError("config.json: sliding_window", value, "must be a positive integer or null")
        return value

    def layer_types(self, default: list[str], known: frozenset[str]) -> list[str]:
        """The type of each layer's attention: ``default`` when absent."""

        def is_right(value: object) -> bool:
            is_list = isinstance(value, list) and len(value) == len(default)
            return is_list and all(isinstance(one, str) and one in known for one in value)

        fix = f"must be a list of {len(default)}, each of {', '.join(sorted(known))}"
        return self._take("layer_types", default, is_right, fix)

    def rope(self, partial: bool = False, types: Collection[str] = tuple(TYPES)) -> RopeShape:
        """The rotary embedding, of one of some types; of a part of each head only where the family has that."""
        self.unused("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
        shape = read_rope(self._config)
        if shape.partial != 1.0 and not partial:
            raise InputError("config.json: partial_rotary_factor", shape.partial, "only 1.0 exists in this family")
        if shape.type not in types:
            fix = f"only {', '.join(types)} exist in this family"
            raise InputError("config.json: rope_type", shape.type, fix)
        return shape

    def finish(self) -> None:
        """Raises InputError naming a field that nothing took: its value might change the model's mathematics."""
        unknown = sorted(key for key, value in self._config.items() if key not in self._taken and value is not None)
        if unknown:
            values = {key: self._config[key] for key in unknown}
            fix = "not known for this family; remove the field only if it does not change the model"
            raise InputError(f"config.json: {', '.join(unknown)}", values, fix)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_ELEMENTS


def with_both_spellings(config: dict, rope: RopeShape, dtype: str) -> dict:
    """A config that transformers 4 and 5 read alike: every field as it was, the other generation's spelling added.

    transformers 4.57 misreads a config of 5 without a word, and the other way round: each falls back to defaults
    for the fields it does not find. ``dtype`` and ``torch_dtype`` say what the tensors are.
    """
    missing = {key: value for key, value in rope.spellings().items() if config.get(key) is None}
    return {**config, **missing, "dtype": dtype, "torch_dtype": dtype}

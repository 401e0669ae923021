"""Model families: for each, how its ``config.json`` reads and where its tensors go. See the README beside ``hf``."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from cpt_mega.errors import InputError
from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.tensor_map import Rule, TensorMap

_HF_NAMES = {"kv_heads": "num_key_value_heads"}


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Args:
        read_shape: takes every field it understands out of the config; what it leaves is refused.
        tensor_rules: the table of tensors of a model of this shape.
        derived: names of tensors that old files hold and that the config alone determines, with ``{layer}``.
        tied: the output layer and the embedding, which a tied model stores once.
    """

    read_shape: Callable[[ConfigReader], ModelShape]
    tensor_rules: Callable[[ModelShape], list[Rule]]
    derived: tuple[str, ...] = ()
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")


def _found() -> dict[str, Family]:
    """Every module of this folder, under its name: a ``model_type``. One without DERIVED has no such tensors."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {
        name: Family(module.read_shape, module.tensor_rules, getattr(module, "DERIVED", ()))
        for name, module in modules.items()
    }


FAMILIES = _found()


def find_family(model_type: object) -> Family:
    """Raises InputError listing the known families."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError("config.json: model_type", model_type, f"supported families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def read_shape(config: dict) -> ModelShape:
    """``config.json`` as a ModelShape. Raises InputError naming a field or a value that is not understood."""
    family, reader = find_family(config.get("model_type")), ConfigReader(config)
    shape = family.read_shape(reader)
    reader.finish()
    if shape.contradiction is not None:
        field, wrong, fix = shape.contradiction
        raise InputError(f"config.json: {_HF_NAMES.get(field, field)}", wrong, fix)
    if shape.rope.partial != 1.0 and shape.rope_factor != 1.0:
        fix = "scales a part of each head, which attention cannot do"
        raise InputError("config.json: partial_rotary_factor", shape.rope.partial, f"type {shape.rope.type} {fix}")
    return shape


def tensor_map(shape: ModelShape) -> TensorMap:
    """The proved map of a model's tensors."""
    return TensorMap(find_family(shape.family).tensor_rules(shape))

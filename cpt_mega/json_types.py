"""Whether what a JSON file held is what type hints say: files come from other machines, other versions, and bad disks.

Only what is used here is understood: plain types, ``Any``, ``list``, ``tuple[X, ...]``, ``dict``, unions, ``TypedDict``,
dataclasses, and ``Annotated`` with a ``Range`` or a ``Pattern``. A bool is no number, and what is to be an ``int`` has no
fraction.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

_LARGEST = 1.7976931348623157e308  # beyond it a whole number is no float


@dataclass(frozen=True)
class Range:
    """Of a number, its ends included."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


@dataclass(frozen=True)
class Pattern:
    """Of a whole text."""

    pattern: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None


Count = Annotated[int, Range(0, 2**63 - 1)]
Digest = Annotated[str, Pattern("[0-9a-f]{64}")]


def finite(value: float) -> float | None:
    """What JSON can hold of a number: None in place of NaN and infinities."""
    return value if math.isfinite(value) else None


def finite_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """Each as ``finite`` has it."""
    return {name: finite(value) for name, value in values.items()}


def type_problem(value: object, hint: Any, name: str = "") -> str | None:
    """What is wrong, by the name of the place within; None when nothing is. Fields without a default must be there."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return type_problem(value, arguments[0], name)
    if origin is Annotated:
        problem = type_problem(value, arguments[0], name)
        return problem or (None if arguments[1].holds(value) else _is_no(value, arguments[1], name))
    if origin in (UnionType, Union):
        problems = [type_problem(value, each, name) for each in arguments]
        return None if None in problems else problems[0]
    if is_dataclass(hint) or is_typeddict(hint):
        return _record_problem(value, hint, name)
    plain = origin or hint
    if plain is tuple:  # JSON has none, but what was made of it may
        value, plain = list(value) if isinstance(value, tuple) else value, list
    if plain is not Any and not _is_plain(value, plain):
        return _is_no(value, getattr(plain, "__name__", plain), name)
    if origin in (list, tuple):
        inner = ((f"{name}[{index}]", arguments[0], one) for index, one in enumerate(value))
    elif origin is dict:
        inner = ((f"{name}.{key}", arguments[1], one) for key, one in value.items())
    else:
        return None
    return next(filter(None, (type_problem(one, each, place) for place, each, one in inner)), None)


def _is_plain(value: object, kind: Any) -> bool:
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)
    return value is None if kind in (None, type(None)) else type(value) is kind


def _record_problem(value: object, hint: Any, name: str) -> str | None:
    if not isinstance(value, dict):
        return _is_no(value, "object", name)
    hints = get_type_hints(hint, include_extras=True)
    if is_typeddict(hint):
        needed = hint.__required_keys__
    else:
        needed = {f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING}
    for key in sorted(needed - value.keys()):
        return f"{_place(name, key)} is missing"
    for key in sorted(value.keys() - hints.keys()):
        return f"{_place(name, key)} is unknown"
    problems = (type_problem(one, hints[key], _place(name, key)) for key, one in value.items())
    return next(filter(None, problems), None)


def _place(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_no(value: object, kind: object, name: str) -> str:
    return f"{name or 'it'} is {value!r:.80}, which is no {kind}"

"""Hypothesis strategies that damage files: what disks, copies, editors and people of ill will make of them."""

import json
from pathlib import Path

from hypothesis import strategies as st

# Counts, offsets and sizes at which arithmetic turns over.
EXTREMES = [
    0,
    1,
    2**7,
    2**8,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
WORDS = ["", "x", "\0", "\ud800", "..", "/", "~nobody-of-this-name", "a" * 5000, "-1", "nan", "0" * 64, "\N{SNOWMAN}"]

_SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([*EXTREMES, *(-number for number in EXTREMES), 10**400, 0.5, -0.0, 1e308])
    | st.sampled_from([float("nan"), float("inf"), float("-inf")])
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
odd_values = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def nested(depth: int) -> str:
    """JSON of lists within lists."""
    return "[" * depth + "]" * depth


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """The bytes with one to three injuries; now and then others altogether."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(_injured(content))
    return content


@st.composite
def _injured(draw, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["cut", "flip", "number", "byte", "splice", "insert", "append", "remove"]))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if kind == "number":
        width = draw(st.sampled_from([4, 8]))
        number = draw(st.sampled_from(EXTREMES)) % (1 << (8 * width))
        return content[:place] + number.to_bytes(width, "little") + content[place + width :]
    if kind == "byte":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if kind == "splice":
        begin, length = draw(st.integers(0, len(content))), draw(st.integers(0, 64))
        return content[:place] + content[begin : begin + length] + content[place:]
    if kind == "remove":
        return content[:place] + content[place + draw(st.integers(1, 16)) :]
    more = draw(st.binary(min_size=1, max_size=16))
    return content[:place] + more + content[place:] if kind == "insert" else content + more


def _places(value: object, place: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in _places(one, (*place, key)))]


def _replaced(value: object, place: tuple, new: object) -> object:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _replaced(copy[place[0]], place[1:], new)
    return copy


def _without(value: object, place: tuple) -> object:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = _without(copy[place[0]], place[1:])
    return copy


@st.composite
def damaged_values(draw, value: object) -> object:
    """Nested lists and dictionaries with one to three entries replaced, taken out, or added."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(value)))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove" and place:
            value = _without(value, place)
        elif kind == "add":
            at = value
            for key in place:
                at = at[key]
            if isinstance(at, dict):
                value = _replaced(value, place, {**at, draw(st.sampled_from(WORDS)): draw(odd_values)})
        else:
            value = _replaced(value, place, draw(odd_values))
    return value


@st.composite
def damaged_json(draw, content: bytes) -> bytes:
    """A JSON file with other values, another structure, or other bytes."""
    kind = draw(st.sampled_from(["values", "values", "values", "bytes", "deep", "duplicate", "number"]))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    value = json.loads(content)
    if kind == "values":
        return json.dumps(draw(damaged_values(value))).encode()
    text, marker = "", "a place that is filled in below"
    place = draw(st.sampled_from(_places(value)))
    text = json.dumps(_replaced(value, place, marker))
    if kind == "deep":
        return text.replace(json.dumps(marker), nested(draw(st.sampled_from([50, 400, 100_000])))).encode()
    if kind == "number":
        number = draw(st.sampled_from(["1" * 5000, "1e400", "-0", "NaN", "1e-400", "0.1" + "0" * 5000]))
        return text.replace(json.dumps(marker), number).encode()
    keys = list(value) if isinstance(value, dict) else []
    if not keys:
        return text.encode()
    key = json.dumps(draw(st.sampled_from(keys)))
    return (json.dumps(value)[:-1] + f", {key}: {json.dumps(draw(odd_values))}}}").encode()


def overwrite(path: Path, content: bytes) -> None:
    """New content in a file of its own: what is mapped or linked elsewhere keeps the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)

"""A name for the values of a tensor that does not depend on how it is cut: a sum over elements of a hash of place and bits.

Each element's place in the whole tensor and its bits, widened to float32, are mixed (as in splitmix64, Steele et al. 2014)
and the results added up modulo 2**64, in two lanes. A sum does not care about order, so shards are hashed where they lie
and their sums added. Widening is exact: a bfloat16 model has one name, in bfloat16 and as float32. It is a check against
accidents and a name, not against forgers: files have SHA-256 for that.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cpt_mega.lineage import text_digest

_LANE = 1 << 64
_HOST_ELEMENTS = 1 << 15  # hashed at once: what stays in a core's cache
_DEVICE_ELEMENTS = 1 << 24  # likewise on a GPU, where each operation must be worth its launch


def _signed(constant: int) -> int:
    return constant - _LANE if constant >= _LANE // 2 else constant


_STEP, _FIRST, _SECOND, _THIRD = (
    _signed(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)


@dataclass(frozen=True)
class Fingerprint:
    """Two sums modulo 2**64. Those of the parts of a tensor add up to that of the whole."""

    first: int = 0
    second: int = 0

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        return Fingerprint((self.first + other.first) % _LANE, (self.second + other.second) % _LANE)

    def __str__(self) -> str:
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def parse(cls, text: str) -> "Fingerprint":
        """Of 32 hexadecimal digits. Raises ValueError."""
        if len(text) != 32:
            raise ValueError(f"{text!r} is no fingerprint")
        return cls(int(text[:16], 16), int(text[16:], 16))


def fingerprint(values: torch.Tensor, offsets: Sequence[int], global_shape: Sequence[int]) -> Fingerprint:
    """The part of a tensor's fingerprint that a shard contributes.

    Args:
        values: floating point of at most 32 bits, or whole numbers; on any device; [*shard].
        offsets: where the shard begins in the whole tensor, one for each axis.
        global_shape: of the whole tensor, one for each axis.
    """
    places, run = _contiguous_runs(values.shape, offsets, global_shape)
    words = _words(values.detach()).reshape(len(places), run)
    most = _DEVICE_ELEMENTS if values.is_cuda else _HOST_ELEMENTS
    total = Fingerprint()
    for row, column in _pieces(len(places), run, most):
        part = words[row, column]
        total += _hashed(part, places[row].to(part.device), column.start)
    return total


def added(parts: Iterable[Mapping[str, Fingerprint]]) -> dict[str, Fingerprint]:
    """Fingerprints by name, those of one name added up."""
    total: dict[str, Fingerprint] = {}
    for part in parts:
        for name, one in part.items():
            total[name] = total.get(name, Fingerprint()) + one
    return total


def weights_digest(fingerprints: Mapping[str, Fingerprint]) -> str:
    """One name for a model: SHA-256 over its tensors' names and fingerprints."""
    return text_digest("".join(f"{name}\0{fingerprints[name]}\n" for name in sorted(fingerprints)))


def _hashed(words: torch.Tensor, places: torch.Tensor, column: int) -> Fingerprint:
    """``words``: [rows, run] whole numbers; ``places``: of each row's start, [rows]."""
    steps = torch.arange(column, column + words.shape[1], device=words.device) * _STEP
    mixed = steps + words  # int64, whatever the words are
    mixed += (places * _STEP).unsqueeze(1)
    mixed *= _FIRST
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    mixed *= _SECOND
    first = int(mixed.sum())
    mixed ^= (mixed >> 29) & 0x7FFFFFFFF
    mixed *= _THIRD
    return Fingerprint(first % _LANE, int(mixed.sum()) % _LANE)


def _words(values: torch.Tensor) -> torch.Tensor:
    """The bits of each value, as whole numbers."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    if values.dtype == torch.float64:
        return values.contiguous().view(torch.int64)
    return values.float().contiguous().view(torch.int32)


def _contiguous_runs(
    shape: Sequence[int], offsets: Sequence[int], global_shape: Sequence[int]
) -> tuple[torch.Tensor, int]:
    """Where in the flat whole tensor each stretch of a shard begins that is contiguous there, and how long these are."""
    axis = len(shape)
    while axis > 0 and (axis == len(shape) or shape[axis] == global_shape[axis]):
        axis -= 1
    strides = [math.prod(global_shape[place + 1 :]) for place in range(len(shape))]
    places = torch.zeros(1, dtype=torch.int64)
    for size, offset, stride in list(zip(shape, offsets, strides, strict=True))[:axis]:
        places = (places.unsqueeze(1) + (offset + torch.arange(size)) * stride).reshape(-1)
    rest = sum(offset * stride for offset, stride in list(zip(offsets, strides, strict=True))[axis:])
    return places + rest, math.prod(shape[axis:])


def _pieces(rows: int, run: int, most: int) -> Iterable[tuple[slice, slice]]:
    """Slices of [rows, run] of about ``most`` elements."""
    width, height = min(run, most), max(1, most // max(1, run))
    for row in range(0, rows, height):
        for column in range(0, run, max(1, width)):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, run))

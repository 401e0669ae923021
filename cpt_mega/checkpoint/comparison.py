"""Where two checkpoints of one step differ, tensor by tensor, whatever layouts wrote them; without megatron-core.

Tensors are global and known by key, so chunks may be cut otherwise. A tensor is read in the thinnest slabs along its first
dimension that no chunk of either checkpoint crosses (core stacks layers there): one slab of A and one chunk of B are in memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cpt_mega.checkpoint.trainer_state import read_state
from cpt_mega.hf.safetensors_io import dtype_name
from cpt_mega.hf.torch_dist import TensorReader

STATE_FIELDS = ("step", "tokens", "stream", "source_losses", "baseline")
_OPTIMIZER = "optimizer."
_PIECE = 1 << 22  # elements that are subtracted at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ValueDifference:
    """Two values of one name; for numbers by how much, else None. ``relative`` is to the larger magnitude."""

    field: str
    a: Any
    b: Any
    absolute: float | None = None
    relative: float | None = None

    def is_within(self, tolerance: float) -> bool:
        """Whether it is small; counts and what is no number are equal or not."""
        return isinstance(self.a, float) and isinstance(self.b, float) and self.relative <= tolerance


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs.

    Attributes:
        elements, differing: of it in all, and those whose values differ; NaN equals NaN, and 0 equals -0.
        absolute, at: the largest difference and its index; inf where one value is not finite or the shapes differ.
        a, b: the values there; None where the shapes differ.
        relative: ``absolute`` to the largest magnitude in either tensor.
        dtypes, shapes: of A and B.
    """

    key: str
    elements: int
    differing: int
    absolute: float
    relative: float
    at: list[int]
    a: float | None
    b: float | None
    dtypes: tuple[str, str]
    shapes: tuple[list[int], list[int]]

    def is_within(self, tolerance: float) -> bool:
        """Whether it is small; without any tolerance another dtype is a difference, whatever the values."""
        return self.relative <= tolerance and (tolerance > 0 or self.dtypes[0] == self.dtypes[1])


@dataclass(frozen=True)
class CheckpointComparison:
    """Two checkpoints of one step.

    Attributes:
        step: of both.
        tensors, elements: that both hold.
        differing: tensors that differ; ``within`` of them by no more than the tolerance.
        differing_elements: in all of them.
        first: in model order, the weights before the optimizer's; None when none differs by more than the tolerance.
        largest: by absolute difference, of all that differ.
        largest_relative: of any tensor that differs, 0 when none does; a tolerance of so much passes them all.
        dtypes: ``(key, A's, B's)`` where they differ.
        weights_only_in, optimizer_only_in: ``(of A, of B)`` keys that the other has not. Weights are a difference; optimizers
            of different kinds keep different tensors.
        state: what of ``trainer_state.json`` differs by more than the tolerance; ``state_within`` is how much differs less.
        not_compared: a sentence each.
    """

    step: int
    tensors: int
    elements: int
    differing: int
    within: int
    differing_elements: int
    first: TensorDifference | None
    largest: TensorDifference | None
    largest_relative: float
    dtypes: list[tuple[str, str, str]]
    weights_only_in: tuple[list[str], list[str]]
    optimizer_only_in: tuple[list[str], list[str]]
    state: list[ValueDifference]
    state_within: int
    not_compared: list[str]

    @property
    def differs(self) -> bool:
        """By more than the tolerance, in whatever."""
        return self.first is not None or any(self.weights_only_in) or bool(self.state)


def compare_checkpoints(
    a: Path, b: Path, tolerance: float = 0.0, progress: Callable[[int], None] = lambda read: None
) -> CheckpointComparison:
    """Compares tensors and the trainer's state of two sealed checkpoints.

    Args:
        tolerance: relative; of numbers to the larger one, of a tensor's elements to the largest magnitude in the tensor.
        progress: told how many bytes were read since it was told last.

    Raises CheckpointError when something cannot be read.
    """
    readers = TensorReader(a), TensorReader(b)
    keys = _in_model_order([key for reader in readers for key in reader.index])
    common = [key for key in keys if all(key in reader.index for reader in readers)]
    found = [_tensor_difference(*readers, key, progress) for key in common]
    differing = [difference for difference in found if difference is not None]
    beyond = [difference for difference in differing if not difference.is_within(tolerance)]
    only = [[key for key in keys if key not in other.index] for other in reversed(readers)]
    optimizer = [[key for key in some if key.startswith(_OPTIMIZER)] for some in only]
    state, state_within, not_compared = _state_differences(a, b, tolerance)
    for some, other in zip(optimizer, ("B", "A"), strict=True):
        if some:
            not_compared.append(f"{len(some)} tensors of the optimizer that {other} has not, as {some[0]}")
    return CheckpointComparison(
        step=read_state(a).step,
        tensors=len(common),
        elements=sum(math.prod(readers[0].index[key].size) for key in common),
        differing=len(differing),
        within=len(differing) - len(beyond),
        differing_elements=sum(difference.differing for difference in differing),
        first=beyond[0] if beyond else None,
        largest=max(differing, key=lambda difference: difference.absolute, default=None),
        largest_relative=max((difference.relative for difference in differing), default=0.0),
        dtypes=[(difference.key, *difference.dtypes) for difference in differing if len(set(difference.dtypes)) > 1],
        weights_only_in=tuple([key for key in some if not key.startswith(_OPTIMIZER)] for some in only),
        optimizer_only_in=tuple(optimizer),
        state=state,
        state_within=state_within,
        not_compared=not_compared,
    )


def value_difference(field: str, a: Any, b: Any) -> ValueDifference | None:
    """None where two values are equal; NaN equals NaN."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if a == b or (numbers and math.isnan(a) and math.isnan(b)):
        return None
    if not numbers:
        return ValueDifference(field, a, b)
    absolute = abs(a - b)
    if not math.isfinite(absolute):
        return ValueDifference(field, a, b, math.inf, math.inf)
    return ValueDifference(field, a, b, absolute, absolute / max(abs(a), abs(b)))


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dictionaries."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{name}.{key}")


def _state_differences(a: Path, b: Path, tolerance: float) -> tuple[list[ValueDifference], int, list[str]]:
    """What differs in the trainer's states by more than the tolerance, how much differs by less, what was not compared."""
    states = [read_state(folder) for folder in (a, b)]
    buckets = [state.baseline.keys() for state in states]
    unread = [f"baseline of {bucket}, which only one has" for bucket in sorted(buckets[0] ^ buckets[1])]
    for state in states:
        state.baseline = {bucket: state.baseline[bucket] for bucket in sorted(buckets[0] & buckets[1])}
    flat = [dict(leaf for name in STATE_FIELDS for leaf in leaves(getattr(state, name), name)) for state in states]
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    found = [value_difference(name, *(values.get(name) for values in flat)) for name in names]
    differing = [difference for difference in found if difference is not None]
    beyond = [difference for difference in differing if not difference.is_within(tolerance)]
    return beyond, len(differing) - len(beyond), unread


def _in_model_order(keys: list[str]) -> list[str]:
    """Each key once: weights in the order of the forward pass as far as keys tell it, then the optimizer's in that order."""
    distinct = list(dict.fromkeys(keys))
    weights = sorted((key for key in distinct if not key.startswith(_OPTIMIZER)), key=_place)
    position = {key: number for number, key in enumerate(weights)}
    kinds: dict[str, int] = {}

    def place(key: str) -> tuple[int, int]:
        weight = next((key[at + 1 :] for at, sign in enumerate(key) if sign == "." and key[at + 1 :] in position), "")
        kind = kinds.setdefault(key.removesuffix(weight), len(kinds))  # master weights, first and second moments
        return kind, position.get(weight, len(position))

    return weights + sorted((key for key in distinct if key.startswith(_OPTIMIZER)), key=place)


def _place(key: str) -> int:
    """Of a weight: what comes before the layers, the layers, what comes after them."""
    after = ("decoder.final_layernorm", "output_layer")
    return 0 if key.startswith("embedding") else 1 + sum(key.startswith(name) * (1 + n) for n, name in enumerate(after))


def _tensor_difference(
    one: TensorReader, other: TensorReader, key: str, progress: Callable[[int], None]
) -> TensorDifference | None:
    """None where a tensor is the same in both."""
    entries = one.index[key], other.index[key]
    dtypes = tuple(dtype_name(entry.properties.dtype) for entry in entries)
    shapes = tuple(list(entry.size) for entry in entries)
    elements = math.prod(shapes[0])
    if shapes[0] != shapes[1]:
        return TensorDifference(key, elements, elements, math.inf, math.inf, [], None, None, dtypes, shapes)
    tally = _Tally()
    for rows in _slabs(*entries):
        slab = _read_slab(one, key, rows, progress)
        _compare_slab(other, key, rows, slab, tally, progress)
    if not tally.differing and dtypes[0] == dtypes[1]:
        return None
    largest = tally.absolute, tally.relative, tally.at, tally.a, tally.b
    return TensorDifference(key, elements, tally.differing, *largest, dtypes, shapes)


def _slabs(*entries: TensorStorageMetadata) -> list[range]:
    """The thinnest parts of the first dimension that no chunk crosses; a single one for a tensor without dimensions."""
    spans = sorted((c.offsets[0], c.offsets[0] + c.sizes[0]) for entry in entries for c in entry.chunks if c.sizes)
    merged: list[range] = []
    for begin, end in spans:
        if merged and begin < merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(end, merged[-1].stop))
        elif begin < end:
            merged.append(range(begin, end))
    return merged if entries[0].size else [range(0)]


def _read_slab(reader: TensorReader, key: str, rows: range, progress: Callable[[int], None]) -> torch.Tensor:
    entry = reader.index[key]
    slab = torch.empty((len(rows), *entry.size[1:]) if entry.size else (), dtype=entry.properties.dtype)

    def take(_key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        _part(slab, rows, offsets, chunk).copy_(chunk)
        progress(chunk.nbytes)

    reader.read([key], entry.properties.dtype, take, rows if entry.size else None)
    return slab


def _compare_slab(
    reader: TensorReader, key: str, rows: range, slab: torch.Tensor, tally: "_Tally", progress: Callable[[int], None]
) -> None:
    entry = reader.index[key]

    def take(_key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        tally.add(_part(slab, rows, offsets, chunk), chunk, offsets)
        progress(chunk.nbytes)

    reader.read([key], entry.properties.dtype, take, rows if entry.size else None)


def _part(slab: torch.Tensor, rows: range, offsets: tuple[int, ...], chunk: torch.Tensor) -> torch.Tensor:
    """Where a chunk lies in a slab."""
    starts = (offsets[0] - rows.start, *offsets[1:]) if offsets else ()
    return slab[tuple(slice(start, start + size) for start, size in zip(starts, chunk.shape, strict=True))]


class _Tally:
    """The differences of one tensor, added chunk by chunk."""

    def __init__(self):
        self.differing, self.absolute, self._scale = 0, 0.0, 0.0
        self.at, self.a, self.b = [], None, None

    @property
    def relative(self) -> float:
        """The largest difference, to the largest finite magnitude of either."""
        return self.absolute / self._scale if self._scale else self.absolute

    def add(self, one: torch.Tensor, other: torch.Tensor, offsets: tuple[int, ...]) -> None:
        """Takes in a part of both, of one shape and not empty; ``offsets``: of its first element in the whole tensor."""
        for values in (one, other):
            ends = (abs(float(end)) for end in values.aminmax())
            self._scale = max(self._scale, *(end for end in ends if math.isfinite(end)), 0.0)
        if one.dtype == other.dtype and torch.equal(one, other):
            return
        shape, done = one.shape, 0
        for x, y in zip(one.reshape(-1).split(_PIECE), other.reshape(-1).split(_PIECE), strict=True):
            x, y = x.double(), y.double()
            gap = (x - y).abs().masked_fill_((x == y) | (x.isnan() & y.isnan()), 0).nan_to_num_(math.inf, math.inf)
            self.differing += int(gap.count_nonzero())
            largest, place = gap.max(dim=0)
            if float(largest) > self.absolute:
                self.absolute, self.a, self.b = float(largest), float(x[place]), float(y[place])
                inside = torch.unravel_index(place + done, shape)
                self.at = [int(i) + offset for i, offset in zip(inside, offsets, strict=True)]
            done += len(x)

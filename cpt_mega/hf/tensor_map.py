"""The map between Hugging Face tensors and megatron-core's stacked tensors, stated once for both directions.

Core keeps one tensor per role for all layers, [layers, rows, ...]; Hugging Face keeps one per layer and projection.
Between the two only rows move: a *run* says which rows of one HF tensor stand where in one core tensor. Import
reads runs into core tensors, export writes them back, and because runs are plain intervals, "every row is used
exactly once" is arithmetic (``TensorMap`` proves it when it is built). Rows are the first axis of an HF tensor; a
bias or norm of shape [n] has n rows of one element.

A rule (``Direct``, ``StackedLayers``, ``QkvGroups``, ``PaddedVocab``) says how one core tensor is made. Keys and
shapes are those of ``GPTModel.sharded_state_dict`` in megatron-core.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """``rows`` consecutive rows: from ``name_row`` of the HF tensor ``name``, at ``row`` of the core tensor."""

    name: str
    name_row: int
    row: int
    rows: int

    def clip(self, start: int, end: int) -> "Run | None":
        """The part of the run within core rows [start, end), or None."""
        low, high = max(self.row, start), min(self.row + self.rows, end)
        if low >= high:
            return None
        return replace(self, name_row=self.name_row + low - self.row, row=low, rows=high - low)


@dataclass(frozen=True)
class Target:
    """A core tensor: ``stack`` are its leading axes (layers), ``shape`` is what one entry of the stack holds."""

    key: str
    stack: Shape
    shape: Shape

    @property
    def global_shape(self) -> Shape:
        return self.stack + self.shape

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one entry of a core tensor: what is read, written and held in memory at once.

    Rows that no run covers are padding, which is zero in a checkpoint and absent from an HF folder.
    """

    target: Target
    entry: Shape
    row: int
    rows: int
    runs: tuple[Run, ...]

    @property
    def offsets(self) -> Shape:
        """Where the block begins in the global tensor."""
        return (*self.entry, self.row, *(0 for _ in self.target.shape[1:]))

    @property
    def shape(self) -> Shape:
        """The block's extent in the global tensor."""
        return (*(1 for _ in self.entry), self.rows, *self.target.shape[1:])

    @property
    def elements(self) -> int:
        return self.rows * self.target.row_elements

    def cut(self, max_elements: int) -> Iterator["Block"]:
        """The same rows in blocks of at most ``max_elements`` (at least one row each)."""
        step = max(1, max_elements // self.target.row_elements)
        end = self.row + self.rows
        for start in range(self.row, end, step):
            stop = min(start + step, end)
            runs = tuple(part for run in self.runs if (part := run.clip(start, stop)))
            yield replace(self, row=start, rows=stop - start, runs=runs)


class Rule(Protocol):
    """How one core tensor is made of HF tensors."""

    @property
    def sources(self) -> dict[str, Shape]:
        """Every HF tensor the rule uses and its shape."""

    @property
    def target(self) -> Target:
        """The core tensor."""

    def blocks(self) -> Iterator[Block]:
        """The core tensor's content, in order."""


@dataclass(frozen=True)
class Direct:
    """One HF tensor, unchanged."""

    key: str
    name: str
    shape: Shape

    @property
    def sources(self) -> dict[str, Shape]:
        return {self.name: self.shape}

    @property
    def target(self) -> Target:
        return Target(self.key, (), self.shape)

    def blocks(self) -> Iterator[Block]:
        rows = self.shape[0]
        yield Block(self.target, (), 0, rows, (Run(self.name, 0, 0, rows),))


@dataclass(frozen=True)
class PaddedVocab:
    """One row per vocabulary entry, then zero rows up to ``padded_rows``, which never leave the checkpoint."""

    key: str
    name: str
    shape: Shape
    padded_rows: int

    @property
    def sources(self) -> dict[str, Shape]:
        return {self.name: self.shape}

    @property
    def target(self) -> Target:
        return Target(self.key, (), (self.padded_rows, *self.shape[1:]))

    def blocks(self) -> Iterator[Block]:
        yield Block(self.target, (), 0, self.padded_rows, (Run(self.name, 0, 0, self.shape[0]),))


@dataclass(frozen=True)
class StackedLayers:
    """One tensor per layer, or several joined by rows in the order of ``parts`` (gate, then up: core's ``linear_fc1``).

    Args:
        layers: how many.
        parts: HF names with ``{layer}`` in them, and shapes that differ in the first axis only.
    """

    key: str
    layers: int
    parts: dict[str, Shape]

    @property
    def sources(self) -> dict[str, Shape]:
        return {n.format(layer=i): s for i in range(self.layers) for n, s in self.parts.items()}

    @property
    def target(self) -> Target:
        shapes = list(self.parts.values())
        return Target(self.key, (self.layers,), (sum(s[0] for s in shapes), *shapes[0][1:]))

    def blocks(self) -> Iterator[Block]:
        # A block per part and not per layer: a tensor-parallel rank then reads its half of gate without reading up.
        for layer in range(self.layers):
            row = 0
            for name, shape in self.parts.items():
                run = Run(name.format(layer=layer), 0, row, shape[0])
                yield Block(self.target, (layer,), row, shape[0], (run,))
                row += shape[0]


@dataclass(frozen=True)
class QkvGroups:
    """Query, key and value interleaved per key/value group: the group's query heads, its key, its value.

    Args:
        names: of query, key and value, with ``{layer}`` in them; or one name, of all three below each other.
        columns: axes after the rows; () for the bias.
    """

    key: str
    layers: int
    names: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    columns: Shape

    @property
    def _rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value in one group."""
        return self.heads // self.kv_heads * self.head_dim, self.head_dim, self.head_dim

    @property
    def sources(self) -> dict[str, Shape]:
        rows = [rows * self.kv_heads for rows in self._rows]
        shapes = [(r, *self.columns) for r in (rows if len(self.names) == 3 else [sum(rows)])]
        return {n.format(layer=i): s for i in range(self.layers) for n, s in zip(self.names, shapes, strict=True)}

    @property
    def target(self) -> Target:
        return Target(self.key, (self.layers,), (sum(self._rows) * self.kv_heads, *self.columns))

    def blocks(self) -> Iterator[Block]:
        for layer in range(self.layers):
            names = [name.format(layer=layer) for name in self.names]
            yield Block(self.target, (layer,), 0, self.target.shape[0], tuple(self._runs(names)))

    def _parts(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """For query, key and value: the tensor, the row where the part begins in it, and its rows in a group."""
        query, key, value = self._rows
        if len(names) == 3:
            return [(name, 0, rows) for name, rows in zip(names, self._rows, strict=True)]
        starts = (0, query * self.kv_heads, (query + key) * self.kv_heads)
        return [(names[0], start, rows) for start, rows in zip(starts, (query, key, value), strict=True)]

    def _runs(self, names: Sequence[str]) -> Iterator[Run]:
        row = 0
        for group in range(self.kv_heads):
            for name, start, rows in self._parts(names):
                yield Run(name, start + group * rows, row, rows)
                row += rows


class TensorMap:
    """The rules of one model put together, and proved to use every row of every tensor exactly once.

    Attributes:
        sources: shape by HF name.
        targets: ``Target`` by core key.
        blocks: every block, in the order of the rules.

    Raises:
        ValueError: the rules overlap or leave a gap; a mistake in the family's table, not in the user's files.
    """

    def __init__(self, rules: Sequence[Rule]):
        self.sources = _joined(rule.sources for rule in rules)
        self.targets = _joined({rule.target.key: rule.target} for rule in rules)
        self.blocks = [block for rule in rules for block in rule.blocks()]
        self._runs: dict[tuple[str, Shape], list[Run]] = {}
        for block in self.blocks:
            self._runs.setdefault((block.target.key, block.entry), []).extend(block.runs)
        self._prove_sources()
        self._prove_targets()

    @property
    def parameters(self) -> int:
        """Elements of the HF tensors, so without padding."""
        return sum(math.prod(shape) for shape in self.sources.values())

    @property
    def padding_elements(self) -> int:
        """Elements that only the checkpoint holds."""
        return sum(math.prod(target.global_shape) for target in self.targets.values()) - self.parameters

    def real_rows(self, key: str) -> int:
        """Rows of an entry of a core tensor that HF tensors have; those after them are padding."""
        return max(run.row + run.rows for (name, _), runs in self._runs.items() if name == key for run in runs)

    def runs(self, key: str, entry: Shape, start: int, end: int) -> Iterator[Run]:
        """What core rows [start, end) of one entry are made of."""
        for run in self._runs[key, entry]:
            if part := run.clip(start, end):
                yield part

    def _prove_sources(self) -> None:
        used: dict[str, list[tuple[int, int]]] = {name: [] for name in self.sources}
        for run in itertools.chain.from_iterable(self._runs.values()):
            used[run.name].append((run.name_row, run.name_row + run.rows))
        for name, spans in used.items():
            _prove_tiling(name, spans, self.sources[name][0])

    def _prove_targets(self) -> None:
        spans: dict[tuple[str, Shape], list[tuple[int, int]]] = {}
        for block in self.blocks:
            spans.setdefault((block.target.key, block.entry), []).append((block.row, block.row + block.rows))
            for run in block.runs:
                if run.clip(block.row, block.row + block.rows) != run:
                    raise ValueError(f"tensor map: {run} reaches beyond its block of {block.target.key}")
        for target in self.targets.values():
            for entry in itertools.product(*map(range, target.stack)):
                _prove_tiling(f"{target.key}{list(entry)}", spans.pop((target.key, entry), []), target.shape[0])
        if spans:
            raise ValueError(f"tensor map: blocks outside their tensors: {sorted(spans)}")


def _joined(parts) -> dict:
    """One dict of several that share no key."""
    joined: dict = {}
    for part in parts:
        if twice := joined.keys() & part.keys():
            raise ValueError(f"tensor map: used by two rules: {sorted(twice)}")
        joined |= part
    return joined


def _prove_tiling(what: str, spans: list[tuple[int, int]], rows: int) -> None:
    """Raises ValueError unless the spans cover [0, rows) without gap or overlap."""
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise ValueError(
                f"tensor map: {what}: rows {min(start, reached)} to {max(start, reached)} used "
                f"{'twice' if start < reached else 'by nothing'}"
            )
        reached = end
    if reached != rows:
        raise ValueError(f"tensor map: {what}: {reached} of {rows} rows are used")

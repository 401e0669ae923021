"""What a checkpoint carries, and how two differ, from JSON and the index: no tensor is read; without megatron-core."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.record import Record, find_record_folder, holds_record, read_record
from cpt_mega.config.load import differing_fields
from cpt_mega.errors import CheckpointError
from cpt_mega.hf.safetensors_io import dtype_name
from cpt_mega.hf.torch_dist import read_index
from cpt_mega.hf.weights import FINGERPRINTS
from cpt_mega.lineage import read_json

OPTIMIZER = "optimizer."
_APART = ("lineage", "config")  # of a state: told for themselves


@dataclass(frozen=True)
class Tensors:
    """Some tensors of an index: ``elements`` with padding, ``dtypes`` how many tensors are of each."""

    count: int
    elements: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Parent:
    """Where a run's weights came from. ``found``: whether a checkpoint is there now; what it says of itself is None else."""

    path: str
    found: bool
    run_id: str | None
    step: int | None
    weights: str | None


@dataclass(frozen=True)
class Inspection:
    """What a folder carries.

    Attributes:
        record: what it says of itself.
        parent: None for an import, and where none is recorded.
        files, bytes: all that lies in the folder.
        index: ``{key: [dtype, shape]}``; empty when ``index_problem`` says why it cannot be read.
        fingerprints: recorded ones by tensor, of the values; None where there are none.
    """

    record: Record
    parent: Parent | None
    files: int
    bytes: int
    index: dict[str, tuple[str, list[int]]]
    index_problem: str
    fingerprints: dict[str, str] | None

    @property
    def weights(self) -> Tensors:
        return _counted(entry for key, entry in self.index.items() if not key.startswith(OPTIMIZER))

    @property
    def optimizer(self) -> Tensors:
        return _counted(entry for key, entry in self.index.items() if key.startswith(OPTIMIZER))

    def to_json(self) -> dict:
        """Everything; what was not recorded is null."""
        record, lineage, config = self.record, self.record.lineage, self.record.config
        names = ("tokenizer_digest", "tokens_by_source", "parent_weights")
        carried = ("corpora", "eval", "packing_version", "code", "libraries", "restore", "began")
        return {
            **record.to_json(),
            "type": "import" if record.is_import else "checkpoint",
            "sealed": record.is_sealed,
            **{name: getattr(record, name) for name in names},
            **{name: lineage.get(name) for name in carried},
            "layout": record.state.get("layout"),
            "precision": config.get("precision"),
            "parent": self.parent and asdict(self.parent),
            "model": record.model,
            "config": config or None,
            "files": self.files,
            "bytes": self.bytes,
            "tensors": {"weights": asdict(self.weights), "optimizer": asdict(self.optimizer)},
            "index_problem": self.index_problem,
            "has_fingerprints": self.fingerprints is not None,
        }


@dataclass(frozen=True)
class FieldDifference:
    """A field that two folders record otherwise; None: one does not record it."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class InspectionDifference:
    """How two checkpoints differ.

    Attributes:
        lineage, config, state, model: fields of ``trainer_state.json`` and ``model.json``.
        tensors: dtypes and shapes of tensors that both have.
        only_in: ``(of A, of B)`` tensors that the other has not.
        values: tensors that both have, of other values by their fingerprints; ``equal_values`` counts the others.
        not_compared: a sentence each.
    """

    a: str
    b: str
    lineage: list[FieldDifference]
    config: list[FieldDifference]
    state: list[FieldDifference]
    model: list[FieldDifference]
    tensors: list[FieldDifference]
    only_in: tuple[list[str], list[str]]
    values: list[str]
    equal_values: int
    not_compared: list[str]

    def to_json(self) -> dict:
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """What an import, an ``iter_*`` folder (sealed or not) or a run's newest complete checkpoint carries.

    Raises CheckpointError when there is none, or what it records is no JSON.
    """
    folder = find_record_folder(path)
    record = read_record(folder)
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    index, problem = _index(folder)
    return Inspection(record, _parent(record), len(sizes), sum(sizes), index, problem, _fingerprints(folder))


def differences(a: Inspection, b: Inspection) -> InspectionDifference:
    """Every field and every tensor that differs; values by fingerprints alone."""
    common = [key for key in sorted(a.index) if key in b.index]
    values, equal, not_compared = _values(a, b, common)
    states = [{key: value for key, value in one.record.state.items() if key not in _APART} for one in (a, b)]
    return InspectionDifference(
        a=str(a.record.folder),
        b=str(b.record.folder),
        lineage=_fields(a.record.lineage, b.record.lineage),
        config=_fields(a.record.config, b.record.config),
        state=_fields(*states),
        model=_fields(a.record.model, b.record.model),
        tensors=[FieldDifference(key, a.index[key], b.index[key]) for key in common if a.index[key] != b.index[key]],
        only_in=(sorted(a.index.keys() - b.index.keys()), sorted(b.index.keys() - a.index.keys())),
        values=values,
        equal_values=equal,
        not_compared=_unread(a, b) + not_compared,
    )


def _index(folder: Path) -> tuple[dict[str, tuple[str, list[int]]], str]:
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return {}, str(error)
    return {key: (dtype_name(entry.properties.dtype), list(entry.size)) for key, entry in index.items()}, ""


def _fingerprints(folder: Path) -> dict[str, str] | None:
    try:
        found = read_json(folder / FINGERPRINTS)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _parent(record: Record) -> Parent | None:
    if record.parent is None:
        return None
    folder = Path(record.parent)
    try:
        found = read_record(folder) if holds_record(folder) else None
    except CheckpointError:
        found = None
    said = (found.run_id, found.step, found.weights) if found else (None, None, None)
    return Parent(record.parent, found is not None, *said)


def _counted(entries: Iterable[tuple[str, list[int]]]) -> Tensors:
    count, elements, dtypes = 0, 0, {}
    for dtype, shape in entries:
        count, elements = count + 1, elements + math.prod(shape)
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    return Tensors(count, elements, dtypes)


def _fields(a: dict, b: dict) -> list[FieldDifference]:
    return [FieldDifference(*one) for one in differing_fields(a, b)]


def _values(a: Inspection, b: Inspection, common: list[str]) -> tuple[list[str], int, list[str]]:
    """Tensors of other values, how many are equal, and why any were not compared."""
    without = [str(one.record.folder) for one in (a, b) if one.fingerprints is None]
    if without:
        return [], 0, [f"values of tensors: {folder} has no {FINGERPRINTS}" for folder in without]
    both = [key for key in common if key in a.fingerprints and key in b.fingerprints]
    values = [key for key in both if a.fingerprints[key] != b.fingerprints[key]]
    left = len(common) - len(both)
    unknown = [f"values of {left} tensors without a fingerprint on both sides"] if left else []
    return values, len(both) - len(values), unknown


def _unread(a: Inspection, b: Inspection) -> list[str]:
    indexes = [f"tensors: {one.index_problem}" for one in (a, b) if one.index_problem]
    records = [one.record for one in (a, b)]
    imports = [f"state, lineage and configuration: {r.folder} is an import" for r in records if r.is_import]
    return indexes + (imports if len(imports) < 2 else [])

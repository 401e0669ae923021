"""Which run came from which checkpoint, over a folder of runs: by the paths that runs recorded, and by the names of weights.

A path says where a parent lay when a run began; it may have moved since, or something else may lie there. The name of the
weights says what it was. So a path counts where the weights there have the name that the run began with, or none is recorded
(an import); else who has that name counts, wherever it lies.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpt_mega.checkpoint.record import Record, holds_record, read_record
from cpt_mega.errors import CheckpointError, InputError

DEEPEST = 8  # folders below the one that is looked through
PATH, WEIGHTS, BASE = "path", "weights", "base digest"  # by what a parent was found
_OTHER_NAME = (
    "the weights there have another name now: kept in another precision, or no longer those the run began with"
)


@dataclass(frozen=True)
class Link:
    """Where a run came from.

    Attributes:
        parent: the record's folder; None when it was not found.
        by: PATH, WEIGHTS or BASE; empty when it was not found.
        note: what is odd about it.
    """

    parent: Path | None
    by: str = ""
    note: str = ""


@dataclass(frozen=True)
class RunNode:
    """A run: its folder and complete checkpoints, oldest first."""

    folder: Path
    checkpoints: list[Record]

    @property
    def newest(self) -> Record:
        return self.checkpoints[-1]


@dataclass(frozen=True)
class Family:
    """Everything that was found.

    Attributes:
        imports: by folder.
        runs, links: by run folder.
        passed_over: a sentence each: folders that are not sealed or cannot be read.
    """

    imports: dict[Path, Record]
    runs: dict[Path, RunNode]
    links: dict[Path, Link]
    passed_over: list[str]

    def children(self, folder: Path) -> list[RunNode]:
        """Runs that started from a checkpoint or an import."""
        return [run for name, run in self.runs.items() if self.links[name].parent == folder]

    @property
    def orphans(self) -> list[RunNode]:
        """Runs whose parent was not found."""
        return [run for name, run in self.runs.items() if self.links[name].parent is None]

    def to_json(self) -> dict:
        """``nodes`` with their type and ``edges`` by node; a run that misses its parent says what it misses."""
        nodes = [{"type": "import", **_import_json(record)} for record in self.imports.values()]
        edges = []
        for name, run in self.runs.items():
            link = self.links[name]
            nodes.append({"type": "run", "path": str(name), **_run_json(run, link)})
            nodes += [{"type": "checkpoint", **record.to_json()} for record in run.checkpoints]
            edges += [{"from": str(name), "to": str(one.folder), "type": "holds"} for one in run.checkpoints]
            if link.parent is not None:
                words = {"type": "started", "by": link.by, "note": link.note}
                edges.append({"from": str(link.parent), "to": str(name), **words})
        return {"nodes": nodes, "edges": edges, "passed_over": self.passed_over}


def read_family(root: str | Path) -> Family:
    """Reads every import and every checkpoint below a folder, and the parents that lie elsewhere and still are there.

    Raises InputError where nothing is found.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError("DIR", str(root), "no such folder; give a folder of runs")
    records, passed_over = _read_records(root)
    if not records:
        fix = "holds no complete checkpoint" + (f" ({passed_over[0]})" if passed_over else "")
        raise InputError("DIR", str(root), f"{fix}; give a folder of runs")
    runs: dict[Path, RunNode] = {}
    for record in sorted(records.values(), key=lambda record: (str(record.run_dir), record.step or 0)):
        if not record.is_import:
            runs.setdefault(record.run_dir, RunNode(record.run_dir, [])).checkpoints.append(record)
    imports = {folder: record for folder, record in sorted(records.items()) if record.is_import}
    return Family(imports, runs, _Linking(imports, runs).links, passed_over)


def _read_records(root: Path) -> tuple[dict[Path, Record], list[str]]:
    """Complete ones by folder, and a sentence for each that was passed over."""
    records: dict[Path, Record] = {}
    passed_over, seen, pending = [], set(), sorted(_folders(root))
    while pending:
        folder = pending.pop(0).resolve()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            record = read_record(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        if not record.is_sealed:
            passed_over.append(f"{folder}: not complete")
            continue
        records[folder] = record
        if record.parent and holds_record(Path(record.parent)):
            pending.append(Path(record.parent))
    return records, passed_over


def _folders(root: Path) -> Iterator[Path]:
    """Imports and checkpoints below a folder; links are not followed and hidden folders not looked into."""
    for place, folders, _files in os.walk(root):
        if holds_record(Path(place)):
            folders.clear()
            yield Path(place)
        elif len(Path(place).relative_to(root).parts) >= DEEPEST:
            folders.clear()
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]


class _Linking:
    """Finds each run's parent; ``links`` by run folder. No run descends from itself, whatever names are equal."""

    def __init__(self, imports: dict[Path, Record], runs: dict[Path, RunNode]):
        self._imports, self._runs = imports, runs
        checkpoints = {one.folder: one for run in runs.values() for one in run.checkpoints}
        self._records = {**imports, **checkpoints}
        self.links: dict[Path, Link] = {}
        for name, run in runs.items():
            link = self._by_path(run)
            if link is not None:
                self.links[name] = link
        # An import does not record its weights' name; the runs that began there do.
        begun = ((runs[name].newest.parent_weights, link.parent) for name, link in self.links.items())
        self._named = {weights: folder for weights, folder in begun if weights and folder in imports}
        for name, run in runs.items():
            if name not in self.links:
                self.links[name] = self._otherwise(run)

    def _by_path(self, run: RunNode) -> Link | None:
        record = self._at_path(run)
        expected = run.newest.parent_weights
        if record is None or (record.weights and expected and record.weights != expected):
            return None
        return None if self._descends(record.folder, run) else Link(record.folder, PATH)

    def _at_path(self, run: RunNode) -> Record | None:
        parent = run.newest.parent
        record = self._records.get(Path(parent).resolve()) if parent else None
        same_base = record is not None and record.base_digest == run.newest.base_digest
        return record if same_base else None

    def _otherwise(self, run: RunNode) -> Link:
        """By the weights' name; else by a path where they have another name; else an import of the same base."""
        name, parent = run.newest.parent_weights, Path(run.newest.parent or "")
        same = [one.folder for one in self._records.values() if name and one.weights == name]
        same += [self._named[name]] if name in self._named else []
        for folder in sorted(same, key=lambda folder: (folder.name != parent.name, str(folder))):
            if not self._descends(folder, run):
                return Link(folder, WEIGHTS, f"the run recorded {run.newest.parent}")
        there = self._at_path(run)
        if there is not None and not self._descends(there.folder, run):
            return Link(there.folder, PATH, _OTHER_NAME)
        return self._by_base(run, parent)

    def _by_base(self, run: RunNode, parent: Path) -> Link:
        """A parent that was no run's checkpoint was an import, so an import of the same files is as good."""
        if run.newest.parent and not parent.name.startswith("iter_"):
            for folder, record in self._imports.items():
                if record.base_digest and record.base_digest == run.newest.base_digest:
                    return Link(folder, BASE, f"the run recorded {run.newest.parent}")
        return Link(None)

    def _descends(self, folder: Path, run: RunNode) -> bool:
        """Whether a checkpoint is the run's own or its descendants'."""
        while (record := self._records[folder]) and not record.is_import:
            if record.run_dir == run.folder:
                return True
            link = self.links.get(record.run_dir)
            if link is None or link.parent is None:
                return False
            folder = link.parent
        return False


def _import_json(record: Record) -> dict:
    shape = record.model.get("shape")
    family = shape.get("family") if isinstance(shape, dict) else None
    source = record.model.get("source")
    return {"path": str(record.folder), "base_digest": record.base_digest, "source": source, "family": family}


def _run_json(run: RunNode, link: Link) -> dict:
    newest = run.newest
    missing = {"path": newest.parent, "weights": newest.parent_weights} if link.parent is None else None
    return {"run_id": newest.run_id, "base_digest": newest.base_digest, "missing": missing}

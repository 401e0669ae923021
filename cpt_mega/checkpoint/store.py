"""Checkpoints of a run: ``checkpoints/iter_0000100`` folders that are complete and verifiable, or do not exist.

A folder is written under a temporary name by all ranks, measured (size and SHA-256 of every file, the work shared by the
ranks), sealed, renamed, and only then named in ``latest_checkpointed_iteration.txt``. Core alone would not do: it checks
no content (most single flipped bits load without a word) and overwrites a folder in place.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.state import save_engine
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.hf.model_info import copy_model_files
from cpt_mega.lineage import (
    damaged_files,
    folder_files,
    is_complete,
    measure_files,
    seal_folder,
    sealed_files,
    write_json,
)

TRACKER = "latest_checkpointed_iteration.txt"
STATE_FILE = "trainer_state.json"
FORMAT = 1


@dataclass
class TrainerState:
    """Everything of a run that is not a tensor. Tokens are real tokens of packed documents.

    Attributes:
        run_id, parent: this run, and the checkpoint or run its weights came from.
        step, tokens: optimizer steps done and tokens consumed.
        stream: the data state, as ``StreamState.to_json`` gives it.
        baseline: step-0 readings of the gates, ``{bucket: perplexity}``.
        source_losses: training losses by source since the last decision on weights: ``{name: [sum, steps]}``.
        judged_step: the last step at which the gates judged.
        gate_stop: why a gate stopped the run here; empty otherwise. A later start judges again before it goes on.
        layout: the fields of the ``engine.mesh.Layout`` it was saved at.
        config: the resolved configuration it was saved under.
        lineage: digests and versions: base, tokenizer, corpora, code, libraries, restore mode.
    """

    run_id: str
    parent: str
    step: int = 0
    tokens: int = 0
    stream: dict = field(default_factory=dict)
    baseline: dict = field(default_factory=dict)
    source_losses: dict = field(default_factory=dict)
    judged_step: int | None = None
    gate_stop: str = ""
    layout: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    lineage: dict = field(default_factory=dict)


def iteration_name(step: int) -> str:
    """Megatron's folder name for a step."""
    return f"iter_{step:07d}"


def save_checkpoint(run_dir: Path, engine: Engine, state: TrainerState, model_files: Path) -> Path:
    """Writes one checkpoint; every rank calls it, and all return when it is sealed and named in the tracker.

    Args:
        run_dir: the run folder.
        engine: weights, optimizer and generators.
        state: goes into ``trainer_state.json``; must be equal on all ranks.
        model_files: a checkpoint whose ``model.json`` and ``hf/`` are copied, so that each folder can be exported alone.
    """
    root, mesh = run_dir / CHECKPOINTS, engine.mesh
    building, final = root / f".building-{iteration_name(state.step)}", root / iteration_name(state.step)
    if mesh.is_main:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    mesh.barrier()
    save_engine(engine, building)
    if mesh.is_main:
        copy_model_files(model_files, building)
        write_json(building / STATE_FILE, {"format": FORMAT, **asdict(state)})
    mesh.barrier()
    measured = _measured(building, mesh)
    if mesh.is_main:
        seal_folder(building, measured)
        shutil.rmtree(final, ignore_errors=True)  # the same step saved again, after a restart from an older one
        os.rename(building, final)
        _write_tracker(root, state.step)
    mesh.barrier()
    return final


def newest_checkpoint(run_dir: Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose every file is what its seal says, and a line for each that was passed over.

    A collective: the ranks share the reading. A run without checkpoints gives None.
    """
    root = run_dir / CHECKPOINTS
    notes: list[str] = []
    for folder in mesh.share(iteration_folders(root) if root.is_dir() else []):
        problem = checkpoint_problem(folder, mesh)
        if problem is None:
            return folder, notes
        notes.append(f"{folder.name} passed over: {problem}")
    return None, notes


def checkpoint_problem(folder: Path, mesh: Mesh) -> str | None:
    """Why a folder cannot be restored from, or None. A collective."""
    if not mesh.share(is_complete(folder)):
        return "not complete"
    try:
        files = sealed_files(folder)
    except CheckpointError as error:
        return str(error)
    mine = dict(sorted(files.items())[mesh.rank :: mesh.world])
    found = mesh.gather(damaged_files(folder, mine))
    damaged = mesh.share(sorted(name for part in found for name in part) if found else None)
    return f"damaged: {', '.join(damaged)}" if damaged else None


def read_state(folder: Path) -> TrainerState:
    """``trainer_state.json`` of a run's checkpoint. Raises CheckpointError for an import or an unreadable file."""
    path = folder / STATE_FILE
    if not path.is_file():
        fix = "holds weights only (an import); use restore.mode=weights, or name a checkpoint of a run"
        raise CheckpointError("model.checkpoint", str(folder), fix)
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return TrainerState(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("model.checkpoint", str(path), f"cannot be read ({error}); use an older one") from error


def _measured(folder: Path, mesh: Mesh) -> dict[str, dict] | None:
    """Sizes and digests of all files on rank 0; each rank reads its share."""
    names = mesh.share(folder_files(folder) if mesh.is_main else None)
    parts = mesh.gather(measure_files(folder, names[mesh.rank :: mesh.world]))
    return {name: entry for part in parts for name, entry in part.items()} if parts else None


def _write_tracker(root: Path, step: int) -> None:
    building = root / f".{TRACKER}"
    building.write_text(f"{step}\n")
    os.replace(building, root / TRACKER)

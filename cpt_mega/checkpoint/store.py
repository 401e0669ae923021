"""Checkpoints of a run as they lie on disk: ``checkpoints/iter_0000100``, what they hold besides tensors, which is whole."""

import os
from pathlib import Path

from cpt_mega.engine.mesh import Mesh
from cpt_mega.errors import CheckpointError
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.hf.reference import PARITY_FILE, remake_command
from cpt_mega.lineage import damaged_files, is_complete, sealed_files

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_name(step: int) -> str:
    """Megatron's folder name for a step."""
    return f"iter_{step:07d}"


def set_tracker(root: Path, step: int) -> None:
    """Names the newest checkpoint of the folder of checkpoints, in place of another."""
    building = root / f".{TRACKER}"
    building.write_text(f"{step}\n")
    os.replace(building, root / TRACKER)


def newest_checkpoint(run_dir: Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose every file is what its seal says, and a line for each that was passed over.

    A collective: the ranks share the reading. A run without checkpoints gives None.
    """
    root = run_dir / CHECKPOINTS
    notes: list[str] = []
    for folder in mesh.share(iteration_folders(root)):
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
    if damaged == [PARITY_FILE]:
        return f"damaged: {PARITY_FILE}, which {remake_command(folder)} makes again"
    return f"damaged: {', '.join(damaged)}" if damaged else None

"""Which checkpoint a path means: an import, one ``iter_*`` folder, or the newest complete one of a run."""

import re
from pathlib import Path

from cpt_mega.errors import CheckpointError
from cpt_mega.hf.model_info import MODEL_FILE
from cpt_mega.lineage import is_complete

CHECKPOINTS = "checkpoints"
_ITERATION = re.compile(r"iter_(\d+)")


def locate_checkpoint(path: str | Path, field: str = "checkpoint") -> Path:
    """The sealed checkpoint folder that ``path`` means.

    Args:
        path: a run folder, its ``checkpoints`` folder, an ``iter_*`` folder, or an import.
        field: the option that an error names.

    Raises:
        CheckpointError: nothing there, an incomplete checkpoint, or an HF folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(field, str(path), "no such folder; give a run, an iter_* folder or an import")
    if is_complete(path):
        return _with_model(path, field)
    if (path / CHECKPOINTS).is_dir():
        return _newest(path / CHECKPOINTS, field)
    if iteration_folders(path):
        return _newest(path, field)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        raise CheckpointError(field, str(path), "is a Hugging Face folder; import it first with tools/import_hf.py")
    raise CheckpointError(field, str(path), "is not a complete checkpoint (no COMPLETE file); name another")


def iteration_folders(checkpoints: str | Path) -> list[Path]:
    """``iter_*`` folders, newest first, complete or not; none where there is no such folder."""
    there = Path(checkpoints).iterdir() if Path(checkpoints).is_dir() else ()
    numbered = [(int(m[1]), p) for p in there if (m := _ITERATION.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of a run's complete checkpoints."""
    folders = iteration_folders(run_dir / CHECKPOINTS)
    return [int(folder.name.removeprefix("iter_")) for folder in folders if is_complete(folder)]


def _newest(checkpoints: Path, field: str) -> Path:
    # The tracker file may be older or newer than what survived; what is complete decides.
    folders = iteration_folders(checkpoints)
    for folder in folders:
        if is_complete(folder):
            return _with_model(folder, field)
    held = f"{len(folders)} folders, none of them complete" if folders else "no iter_* folder"
    raise CheckpointError(field, str(checkpoints), f"holds {held}; name another run or an import")


def _with_model(folder: Path, field: str) -> Path:
    if not (folder / MODEL_FILE).is_file():
        raise CheckpointError(field, str(folder), f"is sealed but holds no {MODEL_FILE}; it is not a model checkpoint")
    return folder

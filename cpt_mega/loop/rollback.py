"""Going back to an earlier checkpoint of a run: a line in the ledger, and a start that obeys it.

The line is on disk before anything is done, and both the running processes and any later start do the same with it: what was
saved since is set aside, the run goes on from the named checkpoint, without the named rows and at a lowered learning rate. So a
run that is killed in between has rolled back all the same.
"""

import os
from pathlib import Path

from cpt_mega.checkpoint.store import set_tracker
from cpt_mega.checkpoint.trainer_state import TrainerState, read_state
from cpt_mega.errors import InputError
from cpt_mega.gates.anomaly import AnomalyState
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.lineage import is_complete
from cpt_mega.loop.run_folder import LEDGER, read_lines

KIND = "rollback"  # of its line in the ledger
ASIDE = ".rolled_back_{number}-{name}"  # what a checkpoint is called that was made in the episode before a rollback


def set_aside(run_dir: Path) -> list[str]:
    """Renames the checkpoints that the last rollback of their run went behind; returns their names. For the folder's owner.

    They are whole, and nothing looks at them any more: somebody may want to. Raises OSError when that cannot be done.
    """
    root, lines = run_dir / CHECKPOINTS, _last_rollbacks(run_dir)
    folders = [folder for folder in iteration_folders(root) if is_complete(folder)] if lines else []
    gone = [folder for folder in folders if _is_behind(folder, lines)]
    for folder in gone:
        number = lines[read_state(folder).run_id]["number"]
        os.rename(folder, root / ASIDE.format(number=number, name=folder.name))
    left = [folder for folder in folders if folder not in gone]
    if gone and left:
        set_tracker(root, int(left[0].name.removeprefix("iter_")))
    return [folder.name for folder in gone]


def pending(run_dir: Path, state: TrainerState) -> dict | None:
    """The rollback that ends at this very state of the run, and that the state does not know of yet."""
    line = _last_rollbacks(run_dir).get(state.run_id)
    is_here = line is not None and line["to_step"] == state.step
    return line if is_here and line["number"] > AnomalyState.from_json(state.anomaly).rollbacks else None


def _is_behind(folder: Path, lines: dict[str, dict]) -> bool:
    try:
        state = read_state(folder)
        made = AnomalyState.from_json(state.anomaly).rollbacks
    except InputError:  # not one to go on from anyway
        return False
    line = lines.get(state.run_id)
    return line is not None and state.step > line["to_step"] and made < line["number"]


def _last_rollbacks(run_dir: Path) -> dict[str, dict]:
    """By the id of the run: a folder may have held others before."""
    needed = {"run_id", "number", "to_step", "exclude", "lr_scale", "calm_step"}
    lines = read_lines(run_dir / LEDGER)
    return {line["run_id"]: line for line in lines if line.get("kind") == KIND and needed <= line.keys()}

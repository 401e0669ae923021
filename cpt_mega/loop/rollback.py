"""Going back to an earlier checkpoint of a run: a line in the ledger, and a start that obeys it.

The line is on disk before anything is done, and both the running processes and any later start do the same with it: what was
saved since is set aside, the run goes on from the named checkpoint, without the named rows and at a lowered learning rate. So a
run that is killed in between has rolled back all the same.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from cpt_mega.checkpoint.store import set_tracker
from cpt_mega.checkpoint.trainer_state import TrainerState, read_state
from cpt_mega.data.stream import MixedStream
from cpt_mega.errors import InputError
from cpt_mega.gates.anomaly import AnomalyState, expect_change, rolled_back, taken_back
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.json_types import Count, type_problem
from cpt_mega.lineage import is_complete
from cpt_mega.loop.run_folder import LEDGER, read_lines

GATES = "gates"  # who else than the guard goes back
KIND = "rollback"  # of its line in the ledger
ASIDE = ".rolled_back_{number}-{name}"  # what a checkpoint is called that was made in the episode before a rollback


class Rollback(TypedDict):
    """What its line says: the run, the how-manieth, where to, and what holds from there on (rows by source).

    ``steering`` is what gates have changed so far, ``raised_replay`` what they have added to the share of replay; ``by`` says
    whose it was, the guard's or theirs.
    """

    run_id: str
    number: Count
    step: Count
    to_step: Count
    exclude: dict[str, list[Count]]
    lr_scale: float
    calm_step: Count | None
    by: NotRequired[str]
    steering: NotRequired[dict]
    raised_replay: NotRequired[float]


def rollback_line(state: TrainerState, to_step: int, reason: str, **what: object) -> dict:
    """The ledger's line of the next rollback of a run; ``what`` are the rest of ``Rollback``. What was excluded stays so, and
    what gates have changed: the checkpoint may know nothing of it."""
    excluded = state.stream.get("excluded", {})
    return {
        "kind": KIND,
        "run_id": state.run_id,
        "number": AnomalyState.from_json(state.anomaly).rollbacks + 1,
        "step": state.step,
        "tokens": state.tokens,
        "to_step": to_step,
        "exclude": excluded,
        "steering": state.steering,
        "raised_replay": state.stream.get("raised", 0.0),
        **what,
        "reason": reason,
    }


def is_rollback(line: dict) -> bool:
    """Whether a line of a ledger is that of a rollback; one that a bad disk made is none."""
    asked = {name: line[name] for name in Rollback.__annotations__ if name in line}
    return line.get("kind") == KIND and type_problem(asked, Rollback) is None


def set_aside(run_dir: Path) -> list[str]:
    """Renames the checkpoints that the last rollback of their run went behind; returns their names. For the folder's owner.

    They are whole, and nothing looks at them any more: somebody may want to. Raises OSError when that cannot be done.
    """
    root, lines = run_dir / CHECKPOINTS, _last_rollbacks(run_dir)
    folders = [folder for folder in iteration_folders(root) if is_complete(folder)] if lines else []
    gone = [folder for folder in folders if _is_behind(folder, lines)]
    for folder in gone:
        number = lines[read_state(folder).run_id]["number"]
        os.rename(folder, _free(root / ASIDE.format(number=number, name=folder.name)))
    left = [folder for folder in folders if folder not in gone]
    if left:
        set_tracker(root, int(left[0].name.removeprefix("iter_")))
    return [folder.name for folder in gone]


def pending(run_dir: Path, state: TrainerState) -> dict | None:
    """The last rollback of a run that this state of it does not know of yet. Where the checkpoint that it named cannot be used
    any more, the state is an older one."""
    line = _last_rollbacks(run_dir).get(state.run_id)
    is_behind = line is not None and line["to_step"] >= state.step
    return line if is_behind and line["number"] > AnomalyState.from_json(state.anomaly).rollbacks else None


def applicable(stream: MixedStream, exclude: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """What can be left out of a run's sources as they are today: of what is there, and never all of a source."""
    plans = {source.name: source.plan.rows for source in stream.sources}
    already = stream.state.excluded
    found = {name: [row for row in rows if row < plans[name]] for name, rows in exclude.items() if name in plans}
    return {name: rows for name, rows in found.items() if len({*rows, *already.get(name, ())}) < plans[name]}


def finish(line: dict, state: TrainerState, stream: MixedStream) -> dict[str, list[int]]:
    """Lets hold what a line says, from where the run stands now; returns the rows that are left out."""
    left_out = applicable(stream, line["exclude"])
    stream.exclude(left_out)
    state.steering = line.get("steering", state.steering)
    known = AnomalyState.from_json(state.anomaly)
    raised = line.get("raised_replay", 0.0)
    if raised != stream.state.raised:
        stream.raise_replay(raised)
        expect_change(known)
    if line.get("by") == GATES:
        known = taken_back(known, line["number"], line["lr_scale"], line["calm_step"])
    else:
        known = rolled_back(known, *(line[name] for name in ("number", "to_step", "step", "lr_scale", "calm_step")))
    state.anomaly = known.to_json()
    return left_out


def _free(path: Path) -> Path:
    """A name that nothing has yet."""
    names = (path if not again else path.with_name(f"{path.name}.{again}") for again in itertools.count())
    return next(name for name in names if not name.exists())


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
    lines = (line for line in read_lines(run_dir / LEDGER) if is_rollback(line))
    return {line["run_id"]: line for line in lines}

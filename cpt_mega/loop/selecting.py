"""The checkpoint of a run to take, from what its folder holds: ``tools/select_checkpoint.py`` as a call. Loads no model."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.trainer_state import TrainerState, read_state
from cpt_mega.errors import InputError
from cpt_mega.gates.changes import Estimate, Measure, measures
from cpt_mega.gates.selection import BUCKETS, Choice, choose, explained, paired_difference
from cpt_mega.hf.locate import CHECKPOINTS, complete_steps, iteration_folders, locate_checkpoint
from cpt_mega.json_types import type_problem
from cpt_mega.loop.run_folder import ITEMS, each_line

_FIELD = "RUN"


@dataclass(frozen=True)
class Selection:
    """What was chosen of a run.

    Attributes:
        difference: J of the choice minus J of the next best, on the same items; None where there is no other, or
            ``items.jsonl`` does not hold them.
        checkpoint: the folder of the choice.
    """

    run_dir: Path
    choice: Choice
    difference: Estimate | None
    checkpoint: Path

    @property
    def reasons(self) -> list[str]:
        """Two sentences."""
        return explained(self.choice, self.difference)

    def to_json(self) -> dict:
        """Plain values."""
        choice = self.choice
        return {
            "run": str(self.run_dir),
            "step": choice.step,
            "checkpoint": str(self.checkpoint),
            "reasons": self.reasons,
            "buckets": list(choice.buckets),
            "weights": {bucket: choice.weights[bucket] for bucket in BUCKETS},
            "next_best": choice.next_best and choice.next_best.step,
            "difference": self.difference and self.difference.to_json(),
            "candidates": [one.to_json() for one in choice.candidates],
        }


def select_checkpoint(run_dir: str | Path, weights: Mapping[str, float] | None = None) -> Selection:
    """Chooses among a run's complete checkpoints, by the looks that the newest of them knows of.

    Args:
        weights: by bucket, in place of those of the run's suite.

    Raises InputError for a folder that is no run, a run without looks, and one of which no checkpoint can be chosen.
    """
    run_dir = Path(run_dir)
    state = _newest_state(run_dir)
    choice = choose(state.gate_history, complete_steps(run_dir), weights)
    if choice.chosen is None:
        raise InputError(_FIELD, str(run_dir), f"has no checkpoint that can be chosen: {_objections(choice)}")
    folders = {int(path.name.removeprefix("iter_")): path for path in iteration_folders(run_dir / CHECKPOINTS)}
    return Selection(run_dir, choice, _difference(run_dir, state, choice), folders[choice.step])


def parse_weights(text: str) -> dict[str, float]:
    """``domain=1,general=2``. Raises InputError."""
    found = {}
    for word in text.split(","):
        bucket, _, number = word.strip().partition("=")
        try:
            found[bucket] = float(number)
        except ValueError:
            found[bucket] = math.nan
        if bucket not in BUCKETS or not 0 <= found[bucket] < math.inf:
            fix = f"weights are written domain=1,general=2, of {', '.join(BUCKETS)}, each 0 or more"
            raise InputError("--weights", word, fix)
    return found


def _newest_state(run_dir: Path) -> TrainerState:
    if not (run_dir / CHECKPOINTS).is_dir():
        fix = "holds no checkpoints folder, so it is no run; name a run.dir"
        raise InputError(_FIELD, str(run_dir), fix)
    state = read_state(locate_checkpoint(run_dir, _FIELD))
    if not state.gate_history:
        fix = "no look at it is recorded, so nothing tells its checkpoints apart; name eval.sets or a gates.suite"
        raise InputError(_FIELD, str(run_dir), fix)
    return state


def _objections(choice: Choice) -> str:
    steps = defaultdict(list)
    for one in choice.candidates:
        steps[one.objection].append(f"{one.step}")
    words = [f"{objection}: step {', '.join(found)}" for objection, found in steps.items()]
    return "; ".join(words) or "none lies at the step of a look"


def _difference(run_dir: Path, state: TrainerState, choice: Choice) -> Estimate | None:
    if choice.next_best is None:
        return None
    looks = {look["step"]: look for look in state.gate_history}
    of = {bucket: looks[choice.step]["scores"][bucket]["of"] for bucket in choice.buckets}
    steps = (choice.step, choice.next_best.step)
    scores = _scores(run_dir, steps, {digest for kinds in of.values() for digest in kinds})
    both = [_measured(of, scores[step], state.item_baseline) for step in steps]
    if None in both or _shapes(both[0]) != _shapes(both[1]):
        return None
    found = paired_difference(*both, choice.weights)
    return found if math.isfinite(found.value) else None


def _scores(run_dir: Path, steps: Sequence[int], digests: set[str]) -> dict[int, dict[str, dict]]:
    """``{step: {digest: {id: (score, size)}}}``, items in the order of their ids; of several lines of an item the last."""
    found = {step: defaultdict(dict) for step in steps}
    for line in each_line(run_dir / ITEMS):
        names = line.get("digest"), line.get("id")
        if line.get("step") in found and all(isinstance(name, str) for name in names) and names[0] in digests:
            values = line["values"] if isinstance(line.get("values"), dict) else {}
            numbers = _number(line.get("score"), math.nan), _number(values.get("targets"), 1.0)
            found[line["step"]][names[0]][names[1]] = numbers
    return {
        step: {digest: dict(sorted(items.items())) for digest, items in probes.items()}
        for step, probes in found.items()
    }


def _measured(
    of: Mapping[str, Mapping[str, str]], scores: dict[str, dict], baseline: dict[str, dict[str, float]]
) -> dict[str, list[Measure]] | None:
    """By bucket; None where a look does not hold every item that step 0 has."""
    whole = all(baseline.get(d, {}).keys() <= scores.get(d, {}).keys() for kinds in of.values() for d in kinds)
    return {bucket: measures(kinds, scores, baseline) for bucket, kinds in of.items()} if whole else None


def _shapes(measured: dict[str, list[Measure]]) -> dict[str, list[int]]:
    return {bucket: [len(measure.now) for measure in found] for bucket, found in measured.items()}


def _number(value: Any, default: float) -> float:
    return default if type_problem(value, float) else float(value)

"""The first difference of two runs, in data, metrics and weights, from their folders alone; without megatron-core.

Of two differences at one step the one that comes first there is named first: the rows of the step, what was computed from
them, the checkpoint after it, what was read from those weights.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.comparison import (
    CheckpointComparison,
    TensorDifference,
    ValueDifference,
    compare_checkpoints,
    leaves,
    value_difference,
)
from cpt_mega.config.load import differing_fields, load_config
from cpt_mega.errors import InputError
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.lineage import is_complete
from cpt_mega.loop.data_comparison import DataComparison, compare_data
from cpt_mega.loop.run_folder import LEDGER, METRICS, read_lines

# In the order in which a step comes to them. Times and rates are never compared.
TRAIN_FIELDS = ("tokens", "tokens_by_source", "loss", "loss_by_source", "grad_norm", "lr")

Watched = AbstractContextManager[Callable[[int, int], None]]
_UNWATCHED: Watched = nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class MetricsComparison:
    """Lines of one kind, by step. Of several lines about one step the last counts: a run that went on did the step again.

    Attributes:
        common, equal, within: steps that both have, those of them that are equal, and that differ by the tolerance at most.
        only_in: ``(of A, of B)`` first and last of each stretch of steps that the other has not.
        repeated: ``(in A, in B)`` lines that a later one of the same step replaced.
        first_step: the first that differs by more than the tolerance; None when none does.
        first: its values that do.
        largest, largest_step: the largest relative difference over all common steps: of the loss, or of any reading.
        not_compared: a sentence each.
    """

    common: int
    equal: int
    within: int
    only_in: tuple[list[list[int]], list[list[int]]]
    repeated: tuple[int, int]
    first_step: int | None
    first: list[ValueDifference]
    largest: ValueDifference | None
    largest_step: int | None
    not_compared: list[str]


@dataclass(frozen=True)
class WeightsComparison:
    """Checkpoints of both runs.

    Attributes:
        checkpoints: of each step that both have, ascending, up to the first pair that differs by more than the tolerance.
        only_in: ``(of A, of B)`` steps of checkpoints that the other has not.
        not_compared: a sentence each: folders that were passed over, and what comes after the first that differs.
    """

    checkpoints: list[CheckpointComparison]
    only_in: tuple[list[int], list[int]]
    not_compared: list[str]

    @property
    def first(self) -> CheckpointComparison | None:
        """The first that differs by more than the tolerance."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.differs), None)


@dataclass(frozen=True)
class FirstDifference:
    """Where two runs part: ``what`` (a field, a tensor, ``rows``) of ``area`` (data, metrics, weights, readings) at a step.

    ``text`` tells both values, or rows, and by how much they differ.
    """

    step: int
    area: str
    what: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two runs. ``config`` lists what was asked for otherwise; it is no difference of the runs by itself."""

    a: str
    b: str
    tolerance: float
    data: DataComparison
    metrics: MetricsComparison
    weights: WeightsComparison
    readings: MetricsComparison
    config: list[ValueDifference]
    config_not_compared: list[str]

    @property
    def first(self) -> FirstDifference | None:
        """None when nothing that was compared differs by more than the tolerance."""
        found = (_first_row(self.data), _first_value("metrics", self.metrics), _first_tensor(self.weights))
        found = [one for one in (*found, _first_value("readings", self.readings)) if one is not None]
        return min(found, key=lambda one: one.step, default=None)

    @property
    def is_exact(self) -> bool:
        """Whether nothing differs at all, the tolerance aside."""
        small = self.metrics.within + self.readings.within
        checkpoints = self.weights.checkpoints
        return self.first is None and not small and not any(c.within + c.state_within for c in checkpoints)

    @property
    def not_compared(self) -> list[str]:
        """A sentence for each thing."""
        parts = (self.data, self.metrics, self.weights, self.readings)
        return [*(sentence for part in parts for sentence in part.not_compared), *self.config_not_compared]

    def to_json(self) -> dict:
        """All of it, the verdict first."""
        first = self.first
        verdict = {"equal": first is None, "exact": self.is_exact, "first": first and asdict(first)}
        return {**verdict, **asdict(self), "not_compared": self.not_compared}


def compare_runs(
    a: str | Path, b: str | Path, tolerance: float = 0.0, drawing: Watched = _UNWATCHED, reading: Watched = _UNWATCHED
) -> Comparison:
    """Compares two run folders.

    Args:
        tolerance: relative; differences up to it are counted, and never the first.
        drawing, reading: yield ``progress(done, in all)`` for steps that are drawn again, and for bytes of checkpoints.

    Raises InputError when a folder is no run's, or the two have nothing in common.
    """
    folders = [_run_folder(name, path) for name, path in (("A", a), ("B", b))]
    with drawing as progress:
        data = compare_data(*folders, progress)
    with reading as progress:
        weights = compare_weights(*folders, tolerance, progress)
    metrics = compare_metrics(*folders, tolerance)
    readings = compare_readings(*folders, tolerance)
    if not (data.steps or metrics.common or weights.checkpoints or readings.common):
        fix = f"nothing in it can be compared with {a}: " + "; ".join(data.not_compared + weights.not_compared)
        raise InputError("B", str(b), f"{fix}; the metrics have no step in common")
    config, unread = compare_configurations(*folders)
    return Comparison(str(a), str(b), tolerance, data, metrics, weights, readings, config, unread)


def compare_metrics(a: Path, b: Path, tolerance: float) -> MetricsComparison:
    """Lines about steps: exact, or to a relative tolerance; counts always exact."""
    found = [_lines(folder, "train") for folder in (a, b)]
    steps = [
        {step: {name: lines[-1][name] for name in TRAIN_FIELDS if name in lines[-1]} for step, lines in some.items()}
        for some in found
    ]
    repeated = tuple(sum(len(lines) - 1 for lines in some.values()) for some in found)
    return _compare_steps("metrics", *steps, tolerance, repeated, lambda field: field == "loss")


def compare_readings(a: Path, b: Path, tolerance: float) -> MetricsComparison:
    """Lines about evaluations, by step, bucket and probe."""
    found = [_lines(folder, "eval") for folder in (a, b)]
    steps = [{step: _readings(lines) for step, lines in some.items()} for some in found]
    repeated = tuple(sum(len(lines) - len(_readings(lines)) for lines in some.values()) for some in found)
    return _compare_steps("readings", *steps, tolerance, repeated, lambda field: field.endswith(".value"))


def compare_weights(
    a: Path, b: Path, tolerance: float, progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightsComparison:
    """Sealed checkpoints of the steps that both runs have, until a pair differs; ``progress(bytes, in all)``."""
    sealed, notes = [], []
    for name, run in (("A", a), ("B", b)):
        folders = {_step_of(folder): folder for folder in _iteration_folders(run)}
        sealed.append({step: folder for step, folder in folders.items() if is_complete(folder)})
        unsealed = sorted(folders.keys() - sealed[-1].keys())
        notes += [f"weights: {folders[step].name} of {name} is not complete" for step in unsealed]
    common = sorted(sealed[0].keys() & sealed[1].keys())
    if not common:
        notes.append("weights: no step has a complete checkpoint in both")
    total = sum(_bytes(some[step]) for some in sealed for step in common)
    done, compared = 0, []

    def read(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    while common and not (compared and compared[-1].differs):
        step = common.pop(0)
        try:
            compared.append(compare_checkpoints(sealed[0][step], sealed[1][step], tolerance, read))
        except InputError as error:
            notes.append(f"weights: the checkpoints of step {step} ({error})")
    if common:
        notes.append(f"weights: checkpoints after the first that differs: steps {', '.join(map(str, common))}")
    notes += [f"weights of step {one.step}: {sentence}" for one in compared for sentence in one.not_compared]
    if compared:
        notes.append("weights: generators and the optimizer's step count, which are not stored as tensors")
    only = tuple(sorted(some.keys() - other.keys()) for some, other in (sealed, reversed(sealed)))
    for who, steps in zip("AB", only, strict=True):
        if steps:
            notes.append(f"weights: checkpoints that only {who} has: steps {', '.join(map(str, steps))}")
    return WeightsComparison(compared, only, notes)


def compare_configurations(a: Path, b: Path) -> tuple[list[ValueDifference], list[str]]:
    """Fields of ``config.yaml`` that differ, but for the run's own place; and why that cannot be told."""
    try:
        values = [load_config(folder / "config.yaml").model_dump(mode="json") for folder in (a, b)]
    except InputError as error:
        return [], [f"configuration: {error}"]
    found = differing_fields(*values)
    return [ValueDifference(name, before, after) for name, before, after in found if name != "run.dir"], []


def _run_folder(name: str, path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(name, str(path), "no such folder; name the run.dir of a run")
    if not any((folder / part).exists() for part in (METRICS, LEDGER, CHECKPOINTS)):
        raise InputError(name, str(path), f"holds no {METRICS}, {LEDGER} or {CHECKPOINTS}; name the run.dir of a run")
    return folder


def _lines(run: Path, kind: str) -> dict[int, list[dict]]:
    """Lines of the metrics of one kind, by step."""
    found: dict[int, list[dict]] = {}
    for line in read_lines(run / METRICS):
        if line.get("kind") == kind and isinstance(line.get("step"), int):
            found.setdefault(line["step"], []).append(line)
    return found


def _readings(lines: list[dict]) -> dict[str, dict]:
    """The last reading of each set of a step."""
    return {
        f"{line.get('bucket')} {line.get('probe')}": {"value": line.get("value"), "n": line.get("n")} for line in lines
    }


def _compare_steps(
    title: str,
    a: dict[int, dict[str, Any]],
    b: dict[int, dict[str, Any]],
    tolerance: float,
    repeated: tuple[int, int],
    is_headline: Callable[[str], bool],
) -> MetricsComparison:
    """Compares named values step by step; a name that one side lacks altogether is not compared."""
    common = sorted(a.keys() & b.keys())
    equal, first_step, first, largest, largest_step, absent = 0, None, [], None, None, {}
    within = 0
    for step in common:
        absent.update(dict.fromkeys(a[step].keys() ^ b[step].keys(), step))
        differing = _differing_values(a[step], b[step])
        beyond = [difference for difference in differing if not difference.is_within(tolerance)]
        equal, within = equal + (not differing), within + (bool(differing) and not beyond)
        if beyond and first_step is None:
            first_step, first = step, beyond
        for difference in differing:
            if is_headline(difference.field) and (largest is None or _amount(difference) > _amount(largest)):
                largest, largest_step = difference, step
    only = tuple(_stretches(some.keys() - other.keys()) for some, other in ((a, b), (b, a)))
    notes = [f"{title}: {name} of steps that have it in one run only" for name in sorted(absent)]
    notes += [
        f"{title}: steps that only {who} has: {_said(some)}" for who, some in zip("AB", only, strict=True) if some
    ]
    notes += [] if common else [f"{title}: no step in common"]
    return MetricsComparison(
        len(common), equal, within, only, repeated, first_step, first, largest, largest_step, notes
    )


def _differing_values(a: dict[str, Any], b: dict[str, Any]) -> list[ValueDifference]:
    """Of the names that both have, in A's order."""
    found = []
    for name in (name for name in a if name in b):
        one, other = dict(leaves(a[name], name)), dict(leaves(b[name], name))
        fields = [*one, *(field for field in other if field not in one)]
        found += [value_difference(field, one.get(field), other.get(field)) for field in fields]
    return [difference for difference in found if difference is not None]


def _amount(difference: ValueDifference) -> float:
    return math.inf if difference.relative is None else difference.relative


def _stretches(steps: Iterable[int]) -> list[list[int]]:
    """First and last of each stretch of consecutive numbers."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return found


def _said(stretches: list[list[int]]) -> str:
    words = [str(first) if first == last else f"{first} to {last}" for first, last in stretches]
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more stretches" if len(words) > 5 else "")


def _iteration_folders(run: Path) -> list[Path]:
    return iteration_folders(run / CHECKPOINTS)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))


def _first_row(data: DataComparison) -> FirstDifference | None:
    if data.first_step is None:
        return None
    if data.rows:
        found = data.rows[0]
        text = f"place {found.place} of the batch is {_row(found.a)} in A, {_row(found.b)} in B"
        return FirstDifference(data.first_step, "data", "rows", text)
    said = "; ".join(f"{one.field} {_values(one)}" for one in data.entries[:3])
    return FirstDifference(data.first_step, "data", "entry of the ledger", said)


def _row(row: dict | None) -> str:
    return "nothing" if row is None else f"row {row['row']} of {row['source']}"


def _first_value(area: str, found: MetricsComparison) -> FirstDifference | None:
    if found.first_step is None:
        return None
    return FirstDifference(found.first_step, area, found.first[0].field, _values(found.first[0]))


def _values(difference: ValueDifference) -> str:
    words = f"{difference.a} in A, {difference.b} in B"
    if difference.relative is None:
        return words
    return f"{words}; absolute {difference.absolute:.3g}, relative {difference.relative:.3g}"


def _first_tensor(weights: WeightsComparison) -> FirstDifference | None:
    found = weights.first
    if found is None:
        return None
    alone = [(key, who) for who, keys in zip("AB", found.weights_only_in, strict=True) for key in keys]
    if found.first is not None:
        what, text = found.first.key, _elements(found.first)
    elif alone:
        what, text = alone[0][0], f"only {alone[0][1]} has it"
    else:
        what, text = f"trainer_state {found.state[0].field}", _values(found.state[0])
    return FirstDifference(found.step, "weights", what, text)


def _elements(tensor: TensorDifference) -> str:
    if tensor.shapes[0] != tensor.shapes[1]:
        return f"shape {tensor.shapes[0]} in A, {tensor.shapes[1]} in B"
    if not tensor.differing:
        return f"{tensor.dtypes[0]} in A, {tensor.dtypes[1]} in B"
    amount = f"absolute {tensor.absolute:.3g}, relative {tensor.relative:.3g}"
    count = f"{tensor.differing:,} of {tensor.elements:,} elements differ"
    return f"{tensor.a:.9g} in A, {tensor.b:.9g} in B at {tensor.at}; {amount}; {count}"

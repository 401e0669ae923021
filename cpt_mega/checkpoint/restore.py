"""Restore modes: what a run takes over from a checkpoint, decided before anything is loaded and printed as a contract.

===============  =====================================================================================================
weights          a new run on old weights: fresh optimizer, fresh schedule with its re-warm, data from the start
weights+moments  a new run that also takes over Adam's moments with their step count, and the master weights
full             the same run goes on: weights, master weights, moments, step, tokens, schedule, data cursors, generators
auto             full from the newest checkpoint of ``run.dir`` when there is one, else weights from ``model.checkpoint``
===============  =====================================================================================================
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.store import TrainerState, checkpoint_problem, newest_checkpoint, read_state
from cpt_mega.config.load import build_config
from cpt_mega.config.schema import Config
from cpt_mega.engine import state as engine_state
from cpt_mega.engine.core_options import NUMERIC
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.locate import locate_checkpoint

_EXCLUDE = "data.exclude."
WEIGHTS, MOMENTS, FULL, AUTO = "weights", "weights+moments", "full", "auto"

# A full restore under another value of these is another run, so it must be asked for by name.
_NEEDS_ACCEPTANCE = (
    "data.sources",
    "data.curriculum",
    "data.packing",
    "precision",
    *(f"train.{name}" for name in ("tokens", "seq_length", "global_batch_size", "seed", "dropout")),
    *(f"optimizer.{name}" for name in ("lr", "min_lr", "weight_decay", "clip_norm", "beta1", "beta2", "eps")),
    *(f"schedule.{name}" for name in ("kind", "warmup_tokens", "decay_tokens")),
    "eval.sets",
    "eval.max_tokens",
    *NUMERIC,
)

# These say what comes from here on, and are asked for to be changed within a run.
_TAKES_EFFECT = tuple(f"data.{name}" for name in ("max_epochs", "at_max_epochs", "row_checks", "exclude", "adaptive"))

# The two optimizers keep different tensors, so one cannot read what the other wrote.
_NEVER = ("train.distributed_optimizer",)


@dataclass(frozen=True)
class Start:
    """Where a run starts: ``mode`` is one of WEIGHTS, MOMENTS and FULL, ``notes`` say what was passed over."""

    mode: str
    folder: Path
    notes: list[str]


@dataclass(frozen=True)
class Restore:
    """A decision. ``state`` is the checkpoint's own, None for a new run.

    ``rows``: the printed contract, ``(item, "restored" | "fresh" | "accepted" | "harmless", note)``.
    """

    start: Start
    state: TrainerState | None
    same_layout: bool
    rows: list[tuple[str, str, str]] = field(default_factory=list)


def find_start(config: Config, mesh: Mesh) -> Start:
    """Which checkpoint a run starts from; its files are all verified. A collective.

    Under ``auto`` and ``full`` the run's own newest comes first, and ``model.checkpoint`` is not looked at then.
    Raises CheckpointError when what is needed is missing or damaged, or when a new run is asked for in a folder where one has
    begun.
    """
    mode, run_dir = config.restore.mode, Path(config.run.dir)
    own, notes = newest_checkpoint(run_dir, mesh)
    if mode in (WEIGHTS, MOMENTS) and own is not None:
        fix = f"already holds {own.name}; continue it with restore.mode=auto, or give the new run another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    if own is not None:
        return Start(FULL, own, notes)
    if notes:
        fix = f"no checkpoint of this run can be used ({'; '.join(notes)}); remove the folder or name another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    start = locate_checkpoint(config.model.checkpoint, "model.checkpoint")
    problem = checkpoint_problem(start, mesh)
    if problem is not None:
        raise CheckpointError("model.checkpoint", str(start), f"{problem}; name another checkpoint or import again")
    return Start(WEIGHTS if mode == AUTO else mode, start, notes)


def plan_restore(config: Config, start: Start, lineage: dict, layout: dict[str, int]) -> Restore:
    """Decides what is restored, what is fresh and what is refused, before anything is loaded.

    Args:
        config: with ``restore.accept``.
        start: from ``find_start``.
        lineage: this run's: ``tokenizer_digest``, ``packing_version``, ``corpora`` by source and ``eval`` by bucket.
        layout: the fields of ``engine.mesh.Layout`` of this run.

    Raises CheckpointError when optimizer state is wanted and not there, and InputError when a field or a corpus differs that
    a full restore does not take over without ``restore.accept``.
    """
    if start.mode == FULL:
        return _full(config, start, lineage, layout)
    return _new_run(start) if start.mode == WEIGHTS else _new_run_with_moments(config, start)


def apply_restore(restore: Restore, engine: Engine) -> None:
    """Loads what the decision says. Raises CheckpointError naming the tensor that does not fit."""
    folder = restore.start.folder
    unexpected = engine_state.unexpected_tensors(engine, folder)
    if unexpected:
        fix = f"holds tensor {unexpected[0]}, which the model has not ({len(unexpected)} such)"
        raise CheckpointError("checkpoint", str(folder), fix)
    if restore.start.mode == WEIGHTS:
        engine_state.load_weights(engine, folder)
    else:
        engine_state.load_everything(engine, folder, restore.same_layout)


def differing_fields(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) for every leaf of two resolved configurations that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differing_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


# What a new run begins with, whatever it takes over.
_FRESH = {
    "step and tokens": "0",
    "learning-rate schedule": "from its re-warm",
    "data cursors": "from the first row",
    "generators": "from train.seed",
    "gate baseline": "taken at step 0",
}


def _new_run(start: Start) -> Restore:
    fresh = {"master weights": "made from the weights", "optimizer moments": "zero", **_FRESH}
    rows = [("weights", "restored", str(start.folder)), *((item, "fresh", note) for item, note in fresh.items())]
    return Restore(start, None, False, rows)


def _new_run_with_moments(config: Config, start: Start) -> Restore:
    state = read_state(start.folder)
    _check_optimizer(config, start.folder)
    differences = differing_fields(_completed(state.config), config.model_dump(mode="json"))
    _refuse_never(list(differences))
    steps = f"with their {state.step} steps, by which Adam corrects their bias"
    rows = [
        ("weights", "restored", str(start.folder)),
        ("master weights", "restored", "bit for bit"),
        ("optimizer moments", "restored", steps),
        *((item, "fresh", note) for item, note in _FRESH.items()),
    ]
    return Restore(start, None, False, rows)


def _check_optimizer(config: Config, folder: Path) -> None:
    """Raises CheckpointError for a checkpoint without optimizer state."""
    if not engine_state.has_optimizer(folder):
        fix = f"{folder} holds no optimizer state; use restore.mode=weights"
        raise CheckpointError("restore.mode", config.restore.mode, fix)


def _full(config: Config, start: Start, lineage: dict, layout: dict[str, int]) -> Restore:
    state = read_state(start.folder)
    _check_optimizer(config, start.folder)
    differences = list(
        differing_fields(_comparable(_completed(state.config)), _comparable(config.model_dump(mode="json")))
    )
    _check_lineage(config, state.lineage, lineage)
    _check_accepted(config, differences)
    stale = [bucket for bucket in state.baseline if _differs(state.lineage["eval"], lineage["eval"], bucket)]
    for bucket in stale:  # what was measured on other items is no baseline
        del state.baseline[bucket]
    same = {"vpp": 1, "cp": 1, **state.layout} == layout  # a folder may be from before these were
    rows = [("weights", "restored", str(start.folder))]
    rows += [(item, "restored", "bit for bit") for item in ("master weights", "optimizer moments")]
    rows.append(("step and tokens", "restored", f"step {state.step}, {state.tokens:,} tokens"))
    rows += [(item, "restored", "") for item in ("learning-rate schedule", "data cursors")]
    rows += [("gate baseline", "restored", ", ".join(state.baseline))] if state.baseline else []
    rows += [("gate baseline", "fresh", f"{', '.join(stale)}: the items are others now")] if stale else []
    rows.append(
        ("generators", "restored", "") if same else ("generators", "fresh", f"saved at {state.layout}, now {layout}")
    )
    if config.precision == "fp8-delayed":
        rows.append(("FP8 scales", "fresh", "delayed scaling measures them again in its first steps"))
    for name, before, after in differences:
        what = "accepted" if _matches(name, _NEEDS_ACCEPTANCE) else _unasked(name)
        if name.startswith(_EXCLUDE):  # what is excluded once stays so, whatever a configuration says later
            before = state.stream.get("excluded", {}).get(name.removeprefix(_EXCLUDE))
        rows.append((name, what, _change(name, before, after)))
    return Restore(start, state, same, rows)


def _completed(config: dict) -> dict:
    """A stored configuration with the defaults of options that did not exist when it was written."""
    return build_config(copy.deepcopy(config)).model_dump(mode="json")


def _comparable(config: dict) -> dict:
    """A configuration without the places of corpora: their content is compared, by digest, and may lie anywhere."""

    def placeless(entries: list[dict]) -> list[dict]:
        return [{key: value for key, value in entry.items() if key != "path"} for entry in entries]

    data, evaluation = config["data"], config["eval"]
    return {
        **config,
        "data": {**data, "sources": placeless(data["sources"])},
        "eval": {**evaluation, "sets": placeless(evaluation["sets"])},
    }


def _differs(before: dict, now: dict, name: str) -> bool:
    """Whether something both know by a name has another digest."""
    return name in before and name in now and before[name] != now[name]


def _check_lineage(config: Config, before: dict, now: dict) -> None:
    """The tokenizer may never change within a run; a corpus may, when its source is accepted: cursors mean other rows."""
    if before["tokenizer_digest"] != now["tokenizer_digest"]:
        fix = f"the checkpoint was trained with tokenizer {before['tokenizer_digest'][:12]}; use that one, or a new run"
        raise InputError("tokenizer.path", now["tokenizer_digest"][:12], fix)
    version = before.get("packing_version")
    if version is None and now["corpora"]:
        fix = "the checkpoint is of older code, whose data state cannot be read; start a new run from it: restore.mode=weights"
        raise InputError("restore.mode", config.restore.mode, fix)
    if version != now["packing_version"] and now["corpora"] and not _matches("data.packing", config.restore.accept):
        fix = (
            f"the checkpoint's rows were packed by version {version}, so cursors mean other rows now; go on with the code that "
            "wrote it, or accept that some rows may be seen twice or never with restore.accept=[data.packing]"
        )
        raise InputError("data.packing", f"version {now['packing_version']}", fix)
    for name, digest in now["corpora"].items():
        if _differs(before["corpora"], now["corpora"], name) and not _matches("data.sources", config.restore.accept):
            fix = (
                "the corpus is not the one the checkpoint was trained on, so its cursor means other rows; bring the old "
                "one back, give the new one another name, or accept it with restore.accept=[data.sources]"
            )
            raise InputError(f"data.sources {name}", digest[:12], fix)
    for bucket, digest in now["eval"].items():
        if _differs(before["eval"], now["eval"], bucket) and not _matches("eval.sets", config.restore.accept):
            fix = (
                "the items are not those the baseline was measured on; bring them back, or accept it with "
                "restore.accept=[eval.sets] and a new baseline is taken"
            )
            raise InputError(f"eval.sets {bucket}", digest[:12], fix)


def _refuse_never(differences: list[tuple[str, Any, Any]]) -> None:
    for name, before, after in differences:
        if name in _NEVER:
            fix = f"the checkpoint was trained with {before!r} and can only go on so; restore it, or start a new run"
            raise InputError(name, after, fix)


def _check_accepted(config: Config, differences: list[tuple[str, Any, Any]]) -> None:
    _refuse_never(differences)
    for name, before, after in differences:
        if _matches(name, _NEEDS_ACCEPTANCE) and not _matches(name, config.restore.accept):
            fix = (
                f"the checkpoint was trained with {_short(before)}; restore that value, accept the change with "
                f"restore.accept=[{name}], or start a new run with restore.mode=weights and another run.dir"
            )
            raise InputError(name, after, fix)


def _unasked(name: str) -> str:
    return "takes effect" if _matches(name, _TAKES_EFFECT) else "harmless"


def _change(name: str, before: Any, after: Any) -> str:
    if not name.startswith(_EXCLUDE):
        return f"{_short(before)} is now {_short(after)}"
    more = set(after or ()) - set(before or ())
    return f"{len(before or ())} rows stay excluded, {len(more)} more from here on"


def _short(value: Any) -> str:
    """A value as text of one line at most; lists of options can be long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _matches(name: str, fields: tuple[str, ...] | list[str]) -> bool:
    """Whether a dotted name is one of some fields or inside one."""
    return any(name == f or name.startswith(f"{f}.") for f in fields)

"""Restore modes: what a run takes over from a checkpoint, decided before anything is loaded and printed as a contract.

========  =====================================================================================================
weights   a new run on old weights: fresh optimizer, fresh schedule with its re-warm, data from the start
full      the same run goes on: weights, master weights, moments, step, tokens, schedule, data cursors, generators
auto      full from the newest checkpoint of ``run.dir`` when there is one, else weights from ``model.checkpoint``
========  =====================================================================================================
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.store import TrainerState, checkpoint_problem, newest_checkpoint, read_state
from cpt_mega.config.schema import Config
from cpt_mega.engine import state as engine_state
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.locate import locate_checkpoint

# A full restore under another value of these is another run, so it must be asked for by name.
_NEEDS_ACCEPTANCE = (
    "data.sources",
    "data.packing",
    "precision",
    *(f"train.{name}" for name in ("tokens", "seq_length", "global_batch_size", "seed", "dropout")),
    *(f"optimizer.{name}" for name in ("lr", "min_lr", "weight_decay", "clip_norm", "beta1", "beta2", "eps")),
    *(f"schedule.{name}" for name in ("kind", "warmup_tokens", "decay_tokens")),
    "eval.sets",
    "eval.max_tokens",
)

# The two optimizers keep different tensors, so one cannot read what the other wrote.
_NEVER = ("train.distributed_optimizer",)


@dataclass(frozen=True)
class Restore:
    """A decision. ``mode`` is ``weights`` or ``full``; ``state`` is the checkpoint's own, None for weights.

    ``rows``: the printed contract, ``(item, "restored" | "fresh" | "refused", note)``. ``notes``: what was passed over.
    """

    mode: str
    folder: Path
    state: TrainerState | None
    same_layout: bool
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_restore(config: Config, run_dir: Path, lineage: dict, mesh: Mesh) -> Restore:
    """Decides what is restored from where. A collective.

    Args:
        config: with ``restore.mode`` and ``restore.accept``.
        run_dir: whose own checkpoints come first under ``auto`` and ``full``.
        lineage: this run's, with ``tokenizer_digest`` and ``corpora``; a full restore must find the same.
        mesh: the processes that share the reading.

    Raises CheckpointError when the checkpoint is missing, damaged or not of the kind the mode needs, and InputError when
    a field differs that a full restore does not take over without ``restore.accept``.
    """
    mode = config.restore.mode
    own, notes = newest_checkpoint(run_dir, mesh)
    if mode == "weights" and own is not None:
        fix = f"already holds {own.name}; continue it with restore.mode=auto, or give the new run another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    if own is None and notes:
        fix = f"no checkpoint of this run can be used ({'; '.join(notes)}); remove the folder or name another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    if own is None:
        start = locate_checkpoint(config.model.checkpoint, "model.checkpoint")
        problem = checkpoint_problem(start, mesh)
        if problem is not None:
            raise CheckpointError("model.checkpoint", str(start), f"{problem}; name another checkpoint or import again")
        if mode != "full":
            return _weights(start, notes)
        own = start
    return _full(config, own, lineage, mesh, notes)


def apply_restore(restore: Restore, engine: Engine) -> None:
    """Loads what the decision says. Raises CheckpointError naming the tensor that does not fit."""
    unexpected = engine_state.unexpected_tensors(engine, restore.folder)
    if unexpected:
        fix = f"holds tensor {unexpected[0]}, which the model has not ({len(unexpected)} such)"
        raise CheckpointError("checkpoint", str(restore.folder), fix)
    if restore.mode == "full":
        engine_state.load_everything(engine, restore.folder, restore.same_layout)
    else:
        engine_state.load_weights(engine, restore.folder)


def differing_fields(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) for every leaf of two resolved configurations that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differing_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _weights(folder: Path, notes: list[str]) -> Restore:
    fresh = {
        "master weights": "made from the weights",
        "optimizer moments": "zero",
        "step and tokens": "0",
        "learning-rate schedule": "from its re-warm",
        "data cursors": "from the first row",
        "generators": "from train.seed",
        "gate baseline": "taken at step 0",
    }
    rows = [("weights", "restored", str(folder)), *((item, "fresh", note) for item, note in fresh.items())]
    return Restore("weights", folder, None, False, rows, notes)


def _full(config: Config, folder: Path, lineage: dict, mesh: Mesh, notes: list[str]) -> Restore:
    state = read_state(folder)
    if not engine_state.has_optimizer(folder):
        raise CheckpointError("restore.mode", "full", f"{folder} holds no optimizer state; use restore.mode=weights")
    layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}
    same = state.layout == layout
    differences = list(differing_fields(state.config, config.model_dump(mode="json")))
    _check_lineage(config, state.lineage, lineage)
    _check_accepted(config, differences)
    rows = [("weights", "restored", str(folder))]
    rows += [(item, "restored", "bit for bit") for item in ("master weights", "optimizer moments")]
    rows.append(("step and tokens", "restored", f"step {state.step}, {state.tokens:,} tokens"))
    rows += [(item, "restored", "") for item in ("learning-rate schedule", "data cursors", "gate baseline")]
    generators = "" if same else f"saved at {state.layout}, now {layout}"
    rows.append(("generators", "restored" if same else "fresh", generators))
    for name, before, after in differences:
        what = "accepted" if _matches(name, _NEEDS_ACCEPTANCE) else "harmless"
        rows.append((name, what, f"{before!r} is now {after!r}"))
    return Restore("full", folder, state, same, rows, notes)


def _check_lineage(config: Config, before: dict, now: dict) -> None:
    """The tokenizer may never change within a run; a corpus may, when its source is accepted: cursors mean other rows."""
    if before["tokenizer_digest"] != now["tokenizer_digest"]:
        fix = f"the checkpoint was trained with tokenizer {before['tokenizer_digest'][:12]}; use that one, or a new run"
        raise InputError("tokenizer.path", now["tokenizer_digest"][:12], fix)
    for name, digest in now["corpora"].items():
        if before["corpora"].get(name, digest) != digest and not _matches("data.sources", config.restore.accept):
            fix = (
                "the corpus is not the one the checkpoint was trained on, so its cursor means other rows; bring the old "
                "one back, give the new one another name, or accept it with restore.accept=[data.sources]"
            )
            raise InputError(f"data.sources {name}", digest[:12], fix)


def _check_accepted(config: Config, differences: list[tuple[str, Any, Any]]) -> None:
    for name, before, after in differences:
        if name in _NEVER:
            fix = f"the checkpoint was trained with {before!r} and can only go on so; restore it, or start a new run"
            raise InputError(name, after, fix)
        if _matches(name, _NEEDS_ACCEPTANCE) and not _matches(name, config.restore.accept):
            fix = (
                f"the checkpoint was trained with {before!r}; restore that value, accept the change with "
                f"restore.accept=[{name}], or start a new run with restore.mode=weights and another run.dir"
            )
            raise InputError(name, after, fix)


def _matches(name: str, fields: tuple[str, ...] | list[str]) -> bool:
    """Whether a dotted name is one of some fields or inside one."""
    return any(name == f or name.startswith(f"{f}.") for f in fields)

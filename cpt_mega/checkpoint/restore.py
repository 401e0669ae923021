"""Restore modes: what a run takes over from a checkpoint, decided before anything is loaded and printed as a contract.

===============  =====================================================================================================
weights          a new run on old weights: fresh optimizer, fresh schedule with its re-warm, data from the start
weights+moments  a new run that also takes over Adam's moments with their step count, and the master weights
full             the same run goes on: weights, master weights, moments, step, tokens, schedule, data cursors, generators
auto             full from the newest checkpoint of ``run.dir`` when there is one, else weights from ``model.checkpoint``
===============  =====================================================================================================
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from cpt_mega.checkpoint.contract import HARMLESS, Contract, Row, class_of, short
from cpt_mega.checkpoint.store import checkpoint_problem, newest_checkpoint
from cpt_mega.checkpoint.trainer_state import TrainerState, has_state, read_state
from cpt_mega.config.load import build_config, differing_fields
from cpt_mega.config.schema import Config
from cpt_mega.engine import state as engine_state
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.locate import CHECKPOINTS, locate_checkpoint
from cpt_mega.hf.model_info import ModelInfo, read_model_info

WEIGHTS, MOMENTS, FULL, AUTO = "weights", "weights+moments", "full", "auto"


@dataclass(frozen=True)
class Start:
    """Where a run starts: ``mode`` is one of WEIGHTS, MOMENTS and FULL, ``notes`` say what was passed over."""

    mode: str
    folder: Path
    notes: list[str]


@dataclass(frozen=True)
class Restore:
    """A decision.

    Attributes:
        state: the checkpoint's own, None for a new run.
        same_layout: whether generators fit.
        same_run: whether the run in this folder goes on; otherwise it gets an id of its own, and the checkpoint as its parent.
        baseline, item_baseline, item_noise: step-0 readings, as TrainerState has them, that a new run which trains nothing
            takes over: its checkpoint is judged by them.
    """

    start: Start
    state: TrainerState | None
    same_layout: bool
    same_run: bool
    contract: Contract
    baseline: dict = field(default_factory=dict)
    item_baseline: dict = field(default_factory=dict)
    item_noise: dict = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The printed contract."""
        return self.contract.rows

    def check(self) -> None:
        """Raises InputError for what is refused, to be called when the contract was printed."""
        self.contract.check()


def find_start(config: Config, mesh: Mesh) -> Start:
    """Which checkpoint a run starts from; its files are all verified. A collective.

    Under ``auto`` and ``full`` the run's own newest comes first, and ``model.checkpoint`` is not looked at then.
    Raises CheckpointError when what is needed is missing or damaged, or when a new run is asked for in a folder where one has
    begun.
    """
    mode, run_dir = config.restore.mode, Path(config.run.dir)
    own, notes = newest_checkpoint(run_dir, mesh)
    if config.restore.is_new_run and own is not None:
        fix = f"already holds {own.name}; continue it with restore.mode=auto, or give the new run another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    if own is not None:
        _refuse_older(config, own)
        return Start(FULL, own, notes)
    if notes:
        fix = f"no checkpoint of this run can be used ({'; '.join(notes)}); remove the folder or name another run.dir"
        raise CheckpointError("run.dir", str(run_dir), fix)
    start = locate_checkpoint(config.model.checkpoint, "model.checkpoint")
    problem = checkpoint_problem(start, mesh)
    if problem is not None:
        raise CheckpointError("model.checkpoint", str(start), f"{problem}; name another checkpoint or import again")
    return Start(WEIGHTS if mode == AUTO else mode, start, notes)


def _refuse_older(config: Config, own: Path) -> None:
    """Raises CheckpointError when ``restore.mode=full`` names an older checkpoint of the very run, which is not looked at."""
    named = Path(config.model.checkpoint)
    asked = config.restore.mode == FULL and named.name.startswith("iter_") and _is_inside(named, config)
    if asked and named.name != own.name:
        fix = (
            f"a run goes on from its newest checkpoint, {own.name}; to go back, move the later iter_* folders out of "
            "run.dir, or name another run.dir"
        )
        raise CheckpointError("model.checkpoint", str(named), fix)


def plan_restore(config: Config, start: Start, lineage: dict, layout: dict[str, int]) -> Restore:
    """Decides what is restored, what is fresh and what is refused, before anything is loaded.

    Args:
        config: with ``restore.accept``.
        start: from ``find_start``.
        lineage: this run's: ``tokenizer_digest``, ``packing_version``, ``corpora`` by source and ``eval`` by bucket.
        layout: the fields of ``engine.mesh.Layout`` of this run.

    Nothing is refused before the contract was printed: ``Restore.check`` raises. Raises CheckpointError for a state that
    cannot be read.
    """
    contract = Contract(config.restore.accept)
    if start.mode == FULL:
        return _full(config, start, lineage, layout, contract)
    return _new_run(config, start, lineage, contract)


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


def _new_run(config: Config, start: Start, lineage: dict, contract: Contract) -> Restore:
    contract.add("weights", "restored", str(start.folder))
    if start.mode == MOMENTS:
        state = read_state(start.folder)
        contract.add("master weights", "restored", "bit for bit")
        _moments(config, start, f"with their {state.step} steps, by which Adam corrects their bias", contract)
        before, now = _completed(state.config)["train"]["distributed_optimizer"], config.train.distributed_optimizer
        if before != now:
            contract.fatal("train.distributed_optimizer", before, now)
    else:
        contract.add("master weights", "fresh", "made from the weights")
        contract.add("optimizer moments", "fresh", "zero")
    contract.add("run id", "fresh", "the checkpoint is its parent")
    contract.add("step", "fresh", "0")
    contract.add("tokens", "fresh", "0")
    contract.add("learning-rate schedule", "fresh", "from its re-warm")
    contract.add("data cursors", "fresh", "from the first row")
    contract.add("generators", "fresh", "from train.seed")
    baseline, items, noise = _baseline_of_parent(config, start, lineage)
    if baseline:
        words = f"baseline of {', '.join(baseline)}: nothing is trained, the checkpoint is judged by its run's step 0"
        contract.add("gate history", "restored", words)
    else:
        contract.add("gate history", "fresh", "baseline taken at step 0")
    contract.add("anomaly window", "fresh", "the first steps are guarded by bounds")
    contract.add("FP8 scales", "fresh", _fp8_note(config))
    _compare_with_parent(config, start, contract)
    return Restore(start, None, False, False, contract, baseline, items, noise)


def _baseline_of_parent(config: Config, start: Start, lineage: dict) -> tuple[dict, dict, dict]:
    """Step-0 readings of the run a checkpoint is from, of items that are the same today, and by how much those of items
    disagreed; only where nothing is trained."""
    if config.train.tokens or not has_state(start.folder):
        return {}, {}, {}
    state = read_state(start.folder)
    before, now = state.lineage["eval"], lineage["eval"]
    same = {name: value for name, value in state.baseline.items() if before.get(name) == now.get(name, "")}
    return same, state.item_baseline, state.item_noise


def _compare_with_parent(config: Config, start: Start, contract: Contract) -> None:
    """What a new run does otherwise than the run its weights are from, if they are a run's: nothing of it is refused."""
    if not has_state(start.folder):
        return
    before = _comparable(_completed(read_state(start.folder).config))
    for name, old, new in differing_fields(before, _comparable(config.model_dump(mode="json"))):
        if class_of(name) != HARMLESS:
            contract.add(name, "fresh", f"{short(old)} in the run the weights are from, {short(new)} here")


def _moments(config: Config, start: Start, note: str, contract: Contract) -> None:
    if engine_state.has_optimizer(start.folder):
        contract.add("optimizer moments", "restored", note)
        return
    fix = f"{start.folder} holds no optimizer state; use restore.mode=weights"
    error = CheckpointError("restore.mode", config.restore.mode, fix)
    contract.refuse("optimizer moments", "the checkpoint holds none", error)


def _full(config: Config, start: Start, lineage: dict, layout: dict[str, int], contract: Contract) -> Restore:
    state = read_state(start.folder)
    now = lineage["eval"]
    stale = [bucket for bucket in state.baseline if bucket in now and state.lineage["eval"].get(bucket) != now[bucket]]
    for bucket in stale:  # what was measured on other items is no baseline, and cannot be compared with what comes
        del state.baseline[bucket]
        for look in state.gate_history:
            look["perplexity"].pop(bucket, None)
    others = state.lineage["eval"] != now or state.lineage.get("suite", {}) != lineage.get("suite", {})
    for look in state.gate_history if others else ():  # patience counts what was found in the same items
        look.pop("objections", None)
    same = {"vpp": 1, "cp": 1, **state.layout} == layout  # a folder may be from before these were
    contract.add("weights", "restored", str(start.folder))
    contract.add("master weights", "restored", "bit for bit")
    _moments(config, start, "bit for bit", contract)
    same_run = _is_inside(start.folder, config)
    if same_run:
        contract.add("run id", "restored", state.run_id)
    else:
        contract.add("run id", "fresh", f"in another run.dir than {state.run_id}, whose checkpoint is its parent")
    contract.add("step", "restored", str(state.step))
    contract.add("tokens", "restored", f"{state.tokens:,}")
    contract.add("learning-rate schedule", "restored", "follows from the tokens and the options of today")
    contract.add("data cursors", "restored", ", ".join(state.stream.get("sources", {})))
    if same:
        contract.add("generators", "restored")
    else:
        before = {name: state.layout.get(name, 1) for name in layout}
        contract.add("generators", "fresh", f"saved at {_words(before)}, now {_words(layout)}")
    _gate_history(state, stale, contract)
    _anomaly_window(state, contract)
    contract.add("FP8 scales", "fresh", _fp8_note(config))
    _check_model(config, start, contract)
    _check_lineage(config, state.lineage, lineage, contract)
    now = _comparable(config.model_dump(mode="json"))
    contract.differences(_comparable(_completed(state.config)), now, state.stream.get("excluded", {}))
    return Restore(start, state, same, same_run, contract)


def _words(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in layout.items())


def _is_inside(folder: Path, config: Config) -> bool:
    """Whether a checkpoint is of the run in ``run.dir``."""
    return folder.resolve().is_relative_to((Path(config.run.dir) / CHECKPOINTS).resolve())


def _gate_history(state: TrainerState, stale: list[str], contract: Contract) -> None:
    if state.baseline or not stale:
        looks = f"baseline of {', '.join(state.baseline) or 'no bucket'}, {len(state.gate_history)} looks"
        contract.add("gate history", "restored", looks)
    if stale:
        contract.add("gate history", "fresh", f"of {', '.join(stale)}: the items are others now")


def _anomaly_window(state: TrainerState, contract: Contract) -> None:
    if not state.anomaly:
        contract.add("anomaly window", "fresh", "the checkpoint has none; the first steps are guarded by bounds")
        return
    known = state.anomaly
    words = f"{len(known['loss_rises'])} steps, {len(known['alarms'])} refused of late, {known['rollbacks']} rollbacks"
    if known["lr_scale"] != 1:
        words += f", learning rate x {known['lr_scale']:g} until step {known['calm_step']}"
    contract.add("anomaly window", "restored", words)


def _fp8_note(config: Config) -> str:
    if config.precision == "fp8-delayed":
        return "delayed scaling measures them again in its first steps"
    return f"{config.precision} keeps none"


def _completed(config: dict) -> dict:
    """A stored configuration with the defaults of options that did not exist when it was written."""
    return build_config(copy.deepcopy(config)).model_dump(mode="json")


def _comparable(config: dict) -> dict:
    """A configuration without the places of corpora: their content is compared, by digest, and may lie anywhere."""

    def placeless(entries: list[dict]) -> list[dict]:
        return [{key: value for key, value in entry.items() if key != "path"} for entry in entries]

    data, evaluation = config["data"], config["eval"]
    return {
        **{name: section for name, section in config.items() if name != "restore"},  # which this very table is about
        "data": {**data, "sources": placeless(data["sources"])},
        "eval": {**evaluation, "sets": placeless(evaluation["sets"])},
    }


def _differs(before: dict, now: dict, name: str) -> bool:
    """Whether something both know by a name has another digest."""
    return name in before and name in now and before[name] != now[name]


def _check_model(config: Config, start: Start, contract: Contract) -> None:
    """A run goes on as the model it is; a ``model.checkpoint`` that is there and is another model is a mistake."""
    own, named = read_model_info(start.folder), _named_model(config)
    if named is None:
        return
    for name, old, new in differing_fields(own.shape.to_json(), named.shape.to_json()):
        fix = (
            f"model.checkpoint is a model with {new!r}, the run's has {old!r}: a run goes on as the model it is; name its own "
            "model, or another run.dir"
        )
        contract.refuse(
            f"model {name}", f"{old!r}, model.checkpoint has {new!r}", InputError(f"model {name}", new, fix)
        )
    if named.base_digest != own.base_digest:
        why = "model.checkpoint is of another base than the run's own, and a run that goes on does not look at it"
        contract.ask("model.checkpoint", config.model.checkpoint, why)


def _named_model(config: Config) -> ModelInfo | None:
    """What lies at ``model.checkpoint`` today; None where it is gone, as nothing of it is needed."""
    try:
        return read_model_info(locate_checkpoint(config.model.checkpoint))
    except InputError:
        return None


def _check_lineage(config: Config, before: dict, now: dict, contract: Contract) -> None:
    """The tokenizer may never change within a run; a corpus may, when its source is accepted: cursors mean other rows."""
    if before["tokenizer_digest"] != now["tokenizer_digest"]:
        was = before["tokenizer_digest"][:12]
        fix = f"the checkpoint was trained with tokenizer {was}; use that one, or a new run"
        error = InputError("tokenizer.path", now["tokenizer_digest"][:12], fix)
        contract.refuse("tokenizer", f"{was} is now {now['tokenizer_digest'][:12]}", error)
    if now["corpora"]:
        _check_packing(config, before.get("packing_version"), now["packing_version"], contract)
    for name, digest in now["corpora"].items():
        if _differs(before["corpora"], now["corpora"], name):
            why = "the corpus is not the one the checkpoint was trained on, so its cursor means other rows"
            contract.ask("data.sources", digest[:12], why, item=f"data.sources {name}")
    for probe, digest in now.get("suite", {}).items():
        if _differs(before.get("suite", {}), now["suite"], probe):
            why = "its items are not those the baseline was measured on, so a new one is taken"
            contract.ask("gates.suite", digest[:12], why, item=f"gates.suite {probe}")
    for bucket, digest in now["eval"].items():
        if _differs(before["eval"], now["eval"], bucket):
            why = "the items are not those the baseline was measured on, so a new one is taken"
            contract.ask("eval.sets", digest[:12], why, item=f"eval.sets {bucket}")


def _check_packing(config: Config, before: int | None, now: int, contract: Contract) -> None:
    if before is None:
        fix = "the checkpoint is of older code, whose data state cannot be read; start a new run from it: restore.mode=weights"
        error = InputError("restore.mode", config.restore.mode, fix)
        contract.refuse("data.packing", "of older code, whose data state cannot be read", error)
    elif before != now:
        why = f"the checkpoint's rows were packed by version {before}, so some rows may be seen twice or never"
        contract.ask("data.packing", f"version {now}", why)

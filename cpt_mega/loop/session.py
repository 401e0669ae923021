"""One process's part of a run, from configuration to outcome: what ``train`` calls after parsing."""

import gc
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from cpt_mega.checkpoint.contract import ASKED, CLASSES
from cpt_mega.checkpoint.restore import FULL, Restore, Start, apply_restore, find_start, plan_restore
from cpt_mega.checkpoint.saving import weights_name
from cpt_mega.checkpoint.store import iteration_name
from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.config import Config, resolved_yaml
from cpt_mega.data.stream import MixedStream
from cpt_mega.engine.fast_paths import FastPath
from cpt_mega.engine.memory import explained
from cpt_mega.engine.mesh import Mesh, start_mesh, stop_mesh
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError, RollBack
from cpt_mega.gates.selection import choose
from cpt_mega.hf.convert import export_hf
from cpt_mega.hf.locate import CHECKPOINTS, complete_steps
from cpt_mega.hf.weights import ModelNames
from cpt_mega.lineage import code_version, new_run_id
from cpt_mega.loop import rollback
from cpt_mega.loop.callbacks import Control, Logging
from cpt_mega.loop.checkpoints import Checkpoints
from cpt_mega.loop.console import Events, fast_paths_table, looks_lines, make_console, show_contract, sources_table
from cpt_mega.loop.evaluation import Evaluation
from cpt_mega.loop.guarding import make_guard
from cpt_mega.loop.hangs import HangWatch
from cpt_mega.loop.housekeeping import Housekeeping, collected_together
from cpt_mega.loop.identity import Identity, check_identity, has_moved, no_values_note, reference_values
from cpt_mega.loop.inputs import Inputs, mean_shares, open_inputs, open_stream
from cpt_mega.loop.judging import Judging
from cpt_mega.loop.overlap import check_overlap
from cpt_mega.loop.profiling import Profiling
from cpt_mega.loop.replay import data_entry
from cpt_mega.loop.reporters import Reporter, open_reporters
from cpt_mega.loop.reweighting import AdaptiveWeights
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.signals import StopRequest
from cpt_mega.loop.start_up import StartUp
from cpt_mega.loop.status import Status
from cpt_mega.loop.stragglers import Stragglers
from cpt_mega.loop.trainer import Trainer
from cpt_mega.loop.verdict_replay import known_at_start


def run_session(config: Config, command: str, request: StopRequest | None = None) -> tuple[str, str]:
    """Runs one process of a run; returns ``(state, reason)`` as ``status.json`` names them.

    Args:
        config: the whole configuration.
        command: what starts this run again, for ``status.json``.
        request: what signals have asked for since the process began; without it they count from here on.

    Raises InputError for anything the user can mend, FaultError for a run that cannot go on.
    """
    clock = StartUp()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with request or StopRequest() as request:
        mesh = start_mesh(config.parallel, config.train.seed, config.run.start_timeout_s)
        clock.mark("processes")
        try:
            return _run(config, mesh, request, command, clock)
        finally:
            stop_mesh()


def _run(config: Config, mesh: Mesh, request: StopRequest, command: str, clock: StartUp) -> tuple[str, str]:
    folder = RunFolder(config.run.dir, mesh.is_main)
    problem = mesh.share(folder.claim())
    if problem is not None:
        raise InputError("run.dir", config.run.dir, problem)
    watch = HangWatch(config.run, mesh.rank)
    try:
        with watch.watching():
            while (outcome := _until_rollback(config, mesh, folder, request, command, clock, watch)) is None:
                config = _going_back(config)
                mesh.set_timeout(config.run.start_timeout_s)  # it is a start once more
                watch.restart()
                clock.begin_again()
                gc.collect()  # engines are rings of references, and hold the device's memory
            return outcome
    finally:
        folder.close()


def _going_back(config: Config) -> Config:
    """For the start after a rollback: nothing but a checkpoint of the run will do, and what it has been going on with was
    accepted since that one was made."""
    accept = tuple(name for name, kind in CLASSES.items() if kind == ASKED)
    restore = config.restore.model_copy(update={"mode": FULL, "accept": accept})
    return config.model_copy(update={"restore": restore})


def _until_rollback(config: Config, mesh: Mesh, folder: RunFolder, *rest) -> tuple[str, str] | None:
    """The outcome; None when the run is to be started again from an earlier checkpoint."""
    try:
        return _run_claimed(config, mesh, folder, *rest)
    except RollBack as back:
        if mesh.is_main:
            make_console().print(f" {back}", style="bold yellow")
        return None


def _run_claimed(
    config: Config,
    mesh: Mesh,
    folder: RunFolder,
    request: StopRequest,
    command: str,
    clock: StartUp,
    watch: HangWatch,
) -> tuple[str, str]:
    console = make_console()
    _set_aside(config, mesh, console)
    restored = _restored(config, mesh, folder, request, console, clock)
    inputs, restore, engine = restored.inputs, restored.restore, restored.engine
    names = ModelNames.of(inputs.info.shape)
    state = _trainer_state(config, restore, inputs.lineage, asdict(mesh.layout), mesh)
    if restore.state is None:
        state.lineage["parent_weights"] = weights_name(engine, names)
    stream = open_stream(config, inputs.sources, state.stream)
    left_out = _finish_rollback(folder, state, stream, mesh)
    guard = make_guard(config, state, inputs.info.shape.vocab_size)  # the last thing that may be refused
    _open_folder(folder, config, inputs, mesh, state.step if restore.state else None)
    status = Status(folder, state, command, config.checkpoint.export_hf != "none")
    status.write("running", "")
    reporters = open_reporters(config, folder.path, state.run_id, state.step) if mesh.is_main else []
    clock.mark("loggers")
    if mesh.is_main:
        _introduce(console, config, inputs, restore, mesh, engine.fast_paths(), clock)
    _record_start(config, folder, inputs, restore, state, stream, {"lr_scale": guard.lr_scale, "exclude": left_out})
    if restored.overlap is not None:
        folder.decide({"step": state.step, **restored.overlap})
    _tell_identity(folder, console, restore.start, restored.identity)

    trainer = Trainer(config, engine, stream, state, guard, decide=_decider(mesh, folder, console))
    going_on = state.step if restore.same_run else None
    keeps_start = inputs.judge.may_roll_back(inputs.suite.perplexity_buckets)
    checkpoints = Checkpoints(restore.start.folder, names, folder, console, going_on, keeps_start)
    control = Control(request, folder)
    judging = Judging(inputs.suite, inputs.judge, folder, console, restore.start.folder)
    trainer.callbacks = [
        Logging(folder, reporters, console),
        Profiling(config.profile, folder.path, mesh.rank, console),
        control,
        guard,
        watch,
        Housekeeping(),
        Stragglers(folder, console),
        AdaptiveWeights(),
        Evaluation(inputs.suite, judging, folder, reporters, console, control, restore.start.folder),
        checkpoints,
        status,
    ]
    with closing(checkpoints):
        outcome = _train(config, trainer, reporters)
    if mesh.is_main:
        _conclude(console, config, folder, outcome, status)
    if outcome[0] != "finished":
        mesh.share(None)  # with any other code one process' end is the others': the status comes first
    return outcome


@dataclass(frozen=True)
class _Restored:
    """The engine as the run begins or goes on with it.

    ``overlap`` is the ledger's line of what of the evaluations is in the data, ``identity`` how far an import is from
    ``transformers``; None where that was not looked at.
    """

    inputs: Inputs
    restore: Restore
    engine: Engine
    overlap: dict | None
    identity: Identity | None


def _restored(
    config: Config, mesh: Mesh, folder: RunFolder, request: StopRequest, console: Console, clock: StartUp
) -> _Restored:
    """The contract is shown, and kept, before anything large is made; an import is compared with its reference values before
    anything has moved."""
    start = find_start(config, mesh)
    inputs = open_inputs(config, start)
    check_layout(config, inputs.info.shape, mesh.world)
    restore = plan_restore(config, start, inputs.lineage, asdict(mesh.layout))
    if mesh.is_main:
        show_contract(console, restore)
    restore.check()
    reference = reference_values(mesh, restore.start, inputs.info)
    clock.mark("data")
    overlap = check_overlap(config, inputs, mesh, folder.path, console, lambda: request.name is not None)
    clock.mark("overlap")
    with explained(config):
        engine = Engine(config, inputs.info.shape, mesh)
    clock.mark("model")
    apply_restore(restore, engine)
    clock.mark("restore")
    identity = None
    if reference is not None:
        with explained(config, engine):
            identity = check_identity(engine, restore.start, reference, config.train.seq_length)
        clock.mark("identity")
    return _Restored(inputs, restore, engine, overlap, identity)


def _tell_identity(folder: RunFolder, console: Console, start: Start, identity: Identity | None) -> None:
    if identity is not None:
        folder.decide(identity.to_json())
    if folder.writes and not has_moved(start):
        console.print(f" {identity or no_values_note(start)}", style="dim")


def _record_start(
    config: Config,
    folder: RunFolder,
    inputs: Inputs,
    restore: Restore,
    state: TrainerState,
    stream: MixedStream | None,
    guard: dict,
) -> None:
    """The ledger's lines of a start: where from, under which contract, in what state the guard is, and with which data."""
    start = restore.start
    place = {"step": state.step, "tokens": state.tokens, "mode": start.mode, "from": str(start.folder)}
    about = {"same_run": restore.same_run, "known": known_at_start(state)}
    folder.decide({"kind": "restore", **place, **guard, **about, "rows": restore.rows})
    if stream is not None:
        folder.decide(data_entry(config, inputs.sources, inputs.lineage["corpora"], state.step, stream.state.to_json()))


def _decider(mesh: Mesh, folder: RunFolder, console: Console) -> Callable[[dict], None]:
    """What writes a decision to the ledger, and says it."""
    events = Events(console)

    def decide(line: dict) -> None:
        folder.decide(line)
        if mesh.is_main:
            events(line)

    return decide


def _train(config: Config, trainer: Trainer, reporters: Sequence[Reporter]) -> tuple[str, str]:
    with collected_together(config.train.gc_interval_steps), explained(config, trainer.engine):
        try:
            return trainer.run()
        except RollBack:
            for reporter in reporters:
                reporter.close()
            raise


def _conclude(console: Console, config: Config, folder: RunFolder, outcome: tuple[str, str], status: Status) -> None:
    """The export, if one is asked for, and only then the final status: who sees ``finished`` finds everything there."""
    if outcome[0] == "finished" and config.checkpoint.export_hf != "none":
        chosen, why = folder.path, ""
        if config.checkpoint.export_hf == "best":
            best = choose(status.state.gate_history, complete_steps(folder.path)).step
            if best is not None:
                chosen, why = chosen / CHECKPOINTS / iteration_name(best), ", the best that no gate objected to,"
        console.print(f" exported {chosen}{why} to {_export(folder.path, chosen)}", style="dim")
    status.write(*outcome)
    console.print(f" {outcome[0]}: {outcome[1]}", style="bold green" if outcome[0] == "finished" else "bold yellow")
    console.print(f" next: {status.next_command(outcome[0])}")


def _export(run_dir: Path, chosen: Path) -> Path:
    """A checkpoint as ``run.dir/export``, in place of an older one, which stands until the new one does."""
    target, building = run_dir / "export", run_dir / ".export-building"
    shutil.rmtree(building, ignore_errors=True)
    export_hf(chosen, building)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(building, target)
    return target


def _trainer_state(config: Config, restore: Restore, lineage: dict, layout: dict, mesh: Mesh) -> TrainerState:
    """The restored state under today's layout, configuration and lineage, or that of a new run."""
    taken = {"baseline": restore.baseline, "item_baseline": restore.item_baseline, "item_noise": restore.item_noise}
    state = restore.state or TrainerState("", "", **taken)
    if not restore.same_run:
        state.run_id, state.parent = mesh.share(new_run_id()), str(restore.start.folder)
        state.first_step = state.step
        state.lineage["parent_weights"] = state.lineage.get("weights")
    before = state.lineage.get("corpora", {})  # a source that is dropped keeps its cursor, so it keeps its name too
    began = state.lineage.get("began") if restore.same_run else restore.start.mode
    code = mesh.share(code_version() if mesh.is_main else None)
    state.lineage = {
        **lineage,
        "corpora": {**before, **lineage["corpora"]},
        "code": code,
        "restore": restore.start.mode,
        "began": began,
        "parent_weights": state.lineage.get("parent_weights"),
    }
    state.layout, state.config = layout, config.model_dump(mode="json")
    return state


def _set_aside(config: Config, mesh: Mesh, console: Console) -> None:
    """Checkpoints that a rollback went behind are not to be found any more. A collective; raises InputError."""
    names, problem = [], None
    if mesh.is_main:
        try:
            names = rollback.set_aside(Path(config.run.dir))
        except OSError as error:
            problem = f"checkpoints that a rollback went behind cannot be renamed ({error.strerror}); mend that"
    problem = mesh.share(problem)
    if problem is not None:
        raise InputError("run.dir", config.run.dir, problem)
    for name in names:
        console.print(f" {name} set aside: the run rolled back behind it", style="yellow")


def _finish_rollback(
    folder: RunFolder, state: TrainerState, stream: MixedStream | None, mesh: Mesh
) -> dict[str, list[int]]:
    """Does what the ledger says of a rollback to where the run stands now; the rows it leaves out. A collective."""
    line = mesh.share(rollback.pending(folder.path, state) if mesh.is_main else None)
    if line is None or stream is None:
        return {}
    return rollback.finish(line, state, stream)


def _open_folder(folder: RunFolder, config: Config, inputs: Inputs, mesh: Mesh, step: int | None) -> None:
    """Begins to write there; ``step``: the one the run goes on from. A collective."""
    ranks = mesh.gather({"rank": mesh.rank, "host": socket.gethostname(), "pid": os.getpid()})
    shares = mean_shares(config, inputs.sources)
    sources = [s.described() | {"share": share} for s, share in zip(inputs.sources, shares, strict=True)]
    folder.open(resolved_yaml(_without_acceptance(config)), ranks, sources, step)


def _without_acceptance(config: Config) -> Config:
    """What was accepted once is no licence for who starts from the run's ``config.yaml``."""
    return config.model_copy(update={"restore": config.restore.model_copy(update={"accept": ()})})


def _introduce(
    console: Console,
    config: Config,
    inputs: Inputs,
    restore: Restore,
    mesh: Mesh,
    fast_paths: Sequence[FastPath],
    clock: StartUp,
) -> None:
    """What a user reads before the first step: layout, contract, mixture, and what the start took."""
    shape = inputs.info.shape
    words = (
        f" {shape.family}, {shape.layers} layers, hidden {shape.hidden_size} | {mesh.layout.name} | {config.precision}"
    )
    console.print(words, style="bold")
    for note in inputs.warnings:
        console.print(f" {note}", style="yellow")
    if inputs.sources:
        console.print(sources_table(inputs.sources, mean_shares(config, inputs.sources)))
    console.print(fast_paths_table(fast_paths))
    if inputs.suite.probes:
        console.print("\n".join(looks_lines(config, inputs.suite)), style="dim")
    console.print(f" start-up: {clock}", style="dim")

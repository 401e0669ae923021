"""One process's part of a run, from configuration to outcome: what ``train`` calls after parsing."""

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from cpt_mega.checkpoint.restore import Restore, apply_restore, find_start, plan_restore
from cpt_mega.checkpoint.store import TrainerState
from cpt_mega.config import Config, resolved_yaml
from cpt_mega.engine.fast_paths import FastPath
from cpt_mega.engine.memory import explained
from cpt_mega.engine.mesh import Mesh, start_mesh, stop_mesh
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.hf.convert import export_hf
from cpt_mega.lineage import code_version, new_run_id
from cpt_mega.loop.callbacks import Checkpoints, Control, Evaluation, Logging
from cpt_mega.loop.console import DataEvents, contract_table, fast_paths_table, make_console, sources_table
from cpt_mega.loop.housekeeping import Housekeeping, collected_together
from cpt_mega.loop.inputs import Inputs, mean_shares, open_inputs, open_stream
from cpt_mega.loop.profiling import Profiling
from cpt_mega.loop.replay import data_entry
from cpt_mega.loop.reporters import open_reporters
from cpt_mega.loop.reweighting import AdaptiveWeights
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.signals import StopRequest
from cpt_mega.loop.start_up import StartUp
from cpt_mega.loop.status import Status
from cpt_mega.loop.trainer import Trainer


def run_session(config: Config, command: str) -> tuple[str, str]:
    """Runs one process of a run; returns ``(state, reason)`` as ``status.json`` names them.

    Args:
        config: the whole configuration.
        command: what starts this run again, for ``status.json``.

    Raises InputError for anything the user can mend, FaultError for a run that cannot go on.
    """
    clock = StartUp()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with StopRequest() as request:
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
    try:
        return _run_claimed(config, mesh, folder, request, command, clock)
    finally:
        folder.close()


def _run_claimed(
    config: Config, mesh: Mesh, folder: RunFolder, request: StopRequest, command: str, clock: StartUp
) -> tuple[str, str]:
    console, layout = make_console(), asdict(mesh.layout)
    start = find_start(config, mesh)
    inputs = open_inputs(config, start)
    check_layout(config, inputs.info.shape, mesh.world)
    restore = plan_restore(config, start, inputs.lineage, layout)
    clock.mark("data")
    with explained(config):
        engine = Engine(config, inputs.info.shape, mesh)
    clock.mark("model")
    apply_restore(restore, engine)
    clock.mark("restore")

    state = _trainer_state(config, restore, inputs.lineage, layout, mesh)
    stream = open_stream(config, inputs.sources, state.stream)  # the last thing that may be refused
    ranks = mesh.gather({"rank": mesh.rank, "host": socket.gethostname(), "pid": os.getpid()})
    shares = mean_shares(config, inputs.sources)
    sources = [s.described() | {"share": share} for s, share in zip(inputs.sources, shares, strict=True)]
    folder.open(resolved_yaml(config), ranks, sources, state.step if restore.state else None)
    status = Status(folder, state, command, config.checkpoint.export_hf == "final")
    status.write("running", "")
    reporters = open_reporters(config, folder.path, state.run_id, state.step) if mesh.is_main else []
    clock.mark("loggers")
    if mesh.is_main:
        _introduce(console, config, inputs, restore, mesh, engine.fast_paths(), clock)
        place = {"step": state.step, "tokens": state.tokens, "mode": start.mode, "from": str(start.folder)}
        folder.decide({"kind": "restore", **place, "rows": restore.rows})
    if stream is not None:
        folder.decide(data_entry(config, inputs.sources, inputs.lineage["corpora"], state.step, stream.state.to_json()))
    events = DataEvents(console)

    def decide(line: dict) -> None:
        folder.decide(line)
        if mesh.is_main:
            events(line)

    trainer = Trainer(config, engine, stream, state, decide=decide)
    trainer.callbacks = [
        Logging(folder, reporters, console),
        Profiling(config.profile, folder.path, mesh.rank, console),
        Control(request, folder),
        Housekeeping(),
        AdaptiveWeights(),
        Evaluation(inputs.sets, folder, reporters, console),
        Checkpoints(folder.path, start.folder, folder, console),
        status,
    ]
    with collected_together(config.train.gc_interval_steps), explained(config, engine):
        outcome = trainer.run()
    if mesh.is_main:
        _conclude(console, config, folder, outcome, status)
    return outcome


def _conclude(console: Console, config: Config, folder: RunFolder, outcome: tuple[str, str], status: Status) -> None:
    """The export, if one is asked for, and only then the final status: who sees ``finished`` finds everything there."""
    if outcome[0] == "finished" and config.checkpoint.export_hf == "final":
        console.print(f" exported {_export(folder.path)}", style="dim")
    status.write(*outcome)
    console.print(f" {outcome[0]}: {outcome[1]}", style="bold green" if outcome[0] == "finished" else "bold yellow")
    console.print(f" next: {status.next_command(outcome[0])}")


def _export(run_dir: Path) -> Path:
    """The newest checkpoint as ``run.dir/export``, in place of an older one, which stands until the new one does."""
    target, building = run_dir / "export", run_dir / ".export-building"
    shutil.rmtree(building, ignore_errors=True)
    export_hf(run_dir, building)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(building, target)
    return target


def _trainer_state(config: Config, restore: Restore, lineage: dict, layout: dict, mesh: Mesh) -> TrainerState:
    """The restored state under today's layout, configuration and lineage, or that of a new run."""
    state = restore.state or TrainerState(run_id=mesh.share(new_run_id()), parent=str(restore.start.folder))
    before = state.lineage.get("corpora", {})  # a source that is dropped keeps its cursor, so it keeps its name too
    code = mesh.share(code_version() if mesh.is_main else None)
    state.lineage = {
        **lineage,
        "corpora": {**before, **lineage["corpora"]},
        "code": code,
        "restore": restore.start.mode,
    }
    state.layout, state.config = layout, config.model_dump(mode="json")
    return state


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
    console.print(contract_table(f"restore: {restore.start.mode}", restore.rows))
    for note in (*restore.start.notes, *inputs.warnings):
        console.print(f" {note}", style="yellow")
    if inputs.sources:
        console.print(sources_table(inputs.sources, mean_shares(config, inputs.sources)))
    console.print(fast_paths_table(fast_paths))
    console.print(f" start-up: {clock}", style="dim")

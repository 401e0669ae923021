"""One process's part of a run, from configuration to outcome: what ``train`` calls after parsing."""

import os
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cpt_mega.checkpoint.restore import Restore, apply_restore, plan_restore
from cpt_mega.checkpoint.store import TrainerState
from cpt_mega.config import Config, resolved_yaml
from cpt_mega.data.sources import Source, corpus_identity, open_sources
from cpt_mega.data.stream import MixedStream, StreamState
from cpt_mega.engine.mesh import Mesh, start_mesh, stop_mesh, world_size
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates.perplexity import open_eval_sets
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import ModelInfo, read_model_info, tokenizer_digest
from cpt_mega.lineage import code_version, file_digest, library_versions, new_run_id
from cpt_mega.loop.callbacks import Checkpoints, Control, Evaluation, Logging
from cpt_mega.loop.console import contract_table, make_console, sources_table
from cpt_mega.loop.reporters import open_reporters
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.signals import StopRequest
from cpt_mega.loop.trainer import Callback, Trainer


def run_session(config: Config, command: Sequence[str]) -> tuple[str, str]:
    """Runs one process of a run; returns ``(state, reason)`` as ``status.json`` names them.

    Raises InputError for anything the user can mend, FaultError for a run that cannot go on.
    """
    clock = _StartUp()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    info = read_model_info(locate_checkpoint(config.model.checkpoint, "model.checkpoint"))
    check_layout(config, info.shape, world_size())
    with StopRequest() as request:
        mesh = start_mesh(config.parallel, config.train.seed)
        clock.mark("processes")
        try:
            return _run(config, info, mesh, request, list(command), clock)
        finally:
            stop_mesh()


def _run(
    config: Config, info: ModelInfo, mesh: Mesh, request: StopRequest, command: list[str], clock: "_StartUp"
) -> tuple[str, str]:
    run_dir, console = Path(config.run.dir), make_console()
    sources, digest = open_data(config, info)
    lineage = _lineage(info, sources, digest, mesh)
    restore = plan_restore(config, run_dir, lineage, mesh)
    sets = open_eval_sets(config, digest, info.shape.vocab_size)
    clock.mark("data")
    engine = Engine(config, info.shape, mesh)
    clock.mark("model")
    apply_restore(restore, engine)
    clock.mark("restore")

    state = _trainer_state(config, restore, lineage, mesh)
    folder = RunFolder(run_dir, mesh.is_main)
    ranks = mesh.gather({"rank": mesh.rank, "host": socket.gethostname(), "pid": os.getpid()})
    folder.open(resolved_yaml(config), ranks, state.step)
    status = _Status(folder, state, command, config.checkpoint.export_hf == "final")
    status.write("running", "")
    reporters = open_reporters(config, run_dir, state.run_id, state.step) if mesh.is_main else []
    clock.mark("loggers")
    if mesh.is_main:
        _introduce(console, config, info, restore, sources, mesh, clock)
        place = {"step": state.step, "tokens": state.tokens, "mode": restore.mode, "from": str(restore.folder)}
        folder.decide({"kind": "restore", **place, "rows": restore.rows})
    stream = _stream(config, sources, state) if sources else None
    trainer = Trainer(config, engine, stream, state)
    trainer.callbacks = _callbacks(config, sets, folder, reporters, console, restore, request, status)
    outcome = trainer.run()
    folder.close()
    status.write(*outcome)
    if mesh.is_main:
        console.print(f" {outcome[0]}: {outcome[1]}", style="bold green" if outcome[0] == "finished" else "bold yellow")
        console.print(f" next: {status.next_command(outcome[0])}")
    return outcome


def open_data(config: Config, info: ModelInfo) -> tuple[list[Source], str]:
    """The mixture's sources, checked against the model's tokenizer, and that tokenizer's digest.

    Raises InputError when a corpus is unusable or was made by another tokenizer.
    """
    digest = info.tokenizer_digest or ""
    if config.tokenizer.path is not None:
        path = Path(config.tokenizer.path)
        digest = (tokenizer_digest(path) if path.is_dir() else file_digest(path) if path.is_file() else None) or ""
        if not digest:
            raise InputError("tokenizer.path", str(path), "holds no tokenizer.json and is no .model file")
        if info.tokenizer_digest not in (None, digest):
            fix = "is not the tokenizer the model was imported with; drop the key or import the model again"
            raise InputError("tokenizer.path", str(path), fix)
    if not config.data.sources:
        return [], digest
    sources = open_sources(
        config.data.sources,
        seq_length=config.train.seq_length,
        packing=config.data.packing,
        tokenizer_digest=digest,
        vocab_size=info.shape.vocab_size,
    )
    return sources, digest


def _stream(config: Config, sources: list[Source], state: TrainerState) -> MixedStream:
    drawn = StreamState.from_json(state.stream) if state.stream else None
    return MixedStream(sources, config.train.seq_length, config.train.seed, drawn)


def _callbacks(config, sets, folder, reporters, console, restore, request, status) -> list[Callback]:
    return [
        Logging(folder, reporters, console),
        Control(request, folder),
        Evaluation(sets, folder, reporters, console),
        Checkpoints(Path(config.run.dir), restore.folder, folder, console),
        status,
    ]


def _lineage(info: ModelInfo, sources: list[Source], digest: str, mesh: Mesh) -> dict:
    """What checkpoints of this run are bound to, besides its configuration."""
    return {
        "base_digest": info.base_digest,
        "tokenizer_digest": digest,
        "corpora": {source.name: corpus_identity(source) for source in sources},
        "code": mesh.share(code_version() if mesh.is_main else None),
        "libraries": library_versions(),
    }


def _trainer_state(config: Config, restore: Restore, lineage: dict, mesh: Mesh) -> TrainerState:
    """The restored state under today's layout, configuration and lineage, or that of a new run."""
    state = restore.state or TrainerState(run_id=mesh.share(new_run_id()), parent=str(restore.folder))
    state.layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}
    state.config = config.model_dump(mode="json")
    state.lineage = {**lineage, "restore": restore.mode}
    return state


def _introduce(console, config, info, restore, sources, mesh, clock) -> None:
    """What a user reads before the first step: layout, contract, mixture, and what the start took."""
    shape = info.shape
    console.print(
        f" {shape.family}, {shape.layers} layers, hidden {shape.hidden_size} | {mesh.name} | {config.precision}",
        style="bold",
    )
    console.print(contract_table(f"restore: {restore.mode}", restore.rows))
    for note in (*restore.notes, *_warnings(config)):
        console.print(f" {note}", style="yellow")
    if sources:
        console.print(sources_table(sources))
    console.print(f" start-up: {clock}", style="dim")


def _warnings(config: Config) -> Iterator[str]:
    """Choices that are allowed and that usually end badly."""
    if config.data.sources and all(source.role == "domain" for source in config.data.sources):
        yield "no replay source: what the model knew before gets no gradient; add one with role: replay (20 % is the default)"
    if config.gates.general_perplexity_limit is not None and all(s.bucket != "general" for s in config.eval.sets):
        yield "no gate is armed: eval.sets has no set with bucket: general, so forgetting is not watched"


class _Status:
    """Keeps ``status.json`` at the step the run has come to, once a log interval; also a callback of the loop."""

    def __init__(self, folder: RunFolder, state: TrainerState, command: list[str], exports: bool):
        self.folder, self.state, self.command, self.exports = folder, state, command, exports

    def write(self, state: str, reason: str) -> None:
        place = (self.state.step, self.state.tokens, self.state.run_id)
        self.folder.status(state, reason, *place, self.next_command(state))

    def next_command(self, state: str) -> str:
        run = shlex.quote(str(self.folder.path))
        if state == "finished" and self.exports:
            return f"python -m cpt_mega.score --checkpoint {run}/export --input ROWS.jsonl --output SCORES.jsonl"
        if state == "finished":
            return f"python tools/export_hf.py --checkpoint {run} --output {run}/export"
        if state == "gate_stop":
            return f"tail -n 3 {run}/ledger.jsonl"
        words = [word for word in self.command if word != "--config"]
        return f"bash launch/torchrun.sh {shlex.join(words)}"

    def on_start(self, trainer: Trainer) -> None:
        pass

    def on_step(self, trainer: Trainer, report) -> None:
        if report.step % trainer.config.logging.interval_steps == 0:
            self.write("running", "")

    def on_end(self, trainer: Trainer) -> None:
        pass


class _StartUp:
    """Seconds of each part of the start, from the start of the process where the system tells it."""

    def __init__(self):
        self.parts: list[tuple[str, float]] = []
        self._last = time.time()
        began = _process_start()
        if began is not None:
            self.parts.append(("imports", self._last - began))

    def mark(self, name: str) -> None:
        now = time.time()
        self.parts.append((name, now - self._last))
        self._last = now

    def __str__(self) -> str:
        words = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts)
        return f"{sum(s for _, s in self.parts):.1f} s ({words})"


def _process_start() -> float | None:
    """When this process was started, in seconds since the epoch."""
    import psutil

    try:
        return psutil.Process().create_time()
    except psutil.Error:
        return None

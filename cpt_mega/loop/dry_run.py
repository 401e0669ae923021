"""``--dry-run``: everything a run checks at its start, in one process and without memory, and the plan it would follow."""

import math
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from cpt_mega.checkpoint.restore import Start, find_start, plan_restore
from cpt_mega.config import Config
from cpt_mega.config.schedule import LearningRate
from cpt_mega.config.schema import ParallelOptions
from cpt_mega.engine.mesh import Layout, start_mesh, stop_mesh
from cpt_mega.engine.plan import plan_ranks
from cpt_mega.engine.platform import check_layout
from cpt_mega.gates.suite import texts_of
from cpt_mega.hf.model_info import ModelInfo
from cpt_mega.hf.reference import read_reference
from cpt_mega.loop.console import looks_lines, make_console, show_contract, sources_table
from cpt_mega.loop.identity import has_moved, no_values_note
from cpt_mega.loop.inputs import Inputs, expected_rows, mean_shares, open_inputs, open_stream
from cpt_mega.loop.lease import holder
from cpt_mega.loop.overlap import search_overlap


def print_plan(config: Config, world: int, command: str) -> None:
    """Checks configuration, checkpoint, layout and data for ``world`` processes and prints what would happen.

    Raises InputError for the first thing that would stop the run.
    """
    layout = Layout.of(config.parallel, world)
    mesh = start_mesh(ParallelOptions(), config.train.seed)
    try:
        start = find_start(config, mesh)
    finally:
        stop_mesh()
    inputs = open_inputs(config, start)
    check_layout(config, inputs.info.shape, world)
    restore = plan_restore(config, start, inputs.lineage, asdict(layout))
    console = make_console()
    show_contract(console, restore)
    restore.check()
    open_stream(config, inputs.sources, restore.state.stream if restore.state else {})
    if not has_moved(start):
        console.print(f" {_identity_note(start, inputs.info)}")
    console.print(_model_table(config, inputs, world))
    console.print(_ranks_table(config, inputs.info, world))
    if inputs.sources:
        console.print(sources_table(inputs.sources, mean_shares(config, inputs.sources)))
    search_overlap(config, inputs, Path(config.run.dir), console)
    for note in inputs.warnings:
        console.print(f" {note}", style="yellow")
    for probe in inputs.suite.probes:
        texts = texts_of(probe)
        tokens = sum(text.inputs for text in texts)
        console.print(f" evaluates {probe.bucket}: {probe.name}, {len(texts):,} texts, {tokens:,} tokens")
    if inputs.suite.probes:
        console.print("\n".join(looks_lines(config, inputs.suite)))
    owner = holder(Path(config.run.dir))
    if owner is not None:
        console.print(f" {config.run.dir} is held by {owner}: a start is refused while that lives", style="yellow")
    console.print(" everything checked; nothing was started", style="bold green")
    console.print(f" next: {command}    # writes {config.run.dir}")


def _identity_note(start: Start, info: ModelInfo) -> str:
    reference = read_reference(start.folder, info)
    if reference is None:
        return no_values_note(start)
    return f"identity: {len(reference.logprobs):,} log-probabilities are compared with those of transformers"


def _model_table(config: Config, inputs: Inputs, world: int) -> Table:
    train, rate, shape = config.train, LearningRate.from_config(config), inputs.info.shape
    steps = math.ceil(expected_rows(config, inputs.sources) / train.global_batch_size)
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False, show_header=False)
    rows = {
        "model": f"{shape.family}, {shape.layers} layers, hidden {shape.hidden_size}, {config.precision}",
        "processes": f"{world}: {Layout.of(config.parallel, world).name}",
        "steps": f"about {steps:,} of {train.global_batch_size:,} rows of {train.seq_length:,} tokens",
        "learning rate": f"{rate.kind}: {rate.peak:g} after {rate.warmup_tokens:,} tokens, then {rate.floor:g} at the end",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _ranks_table(config: Config, info: ModelInfo, world: int) -> Table:
    table = Table(title="memory before activations", title_justify="left", box=None, pad_edge=False)
    for name in ("rank", "stage", "parameters", "GiB"):
        table.add_column(name, justify="right")
    for rank in plan_ranks(config, info.shape, world):
        table.add_row(str(rank.rank), str(rank.stage), f"{rank.parameters:,}", f"{rank.state_gib:.2f}")
    return table

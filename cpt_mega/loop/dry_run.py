"""``--dry-run``: everything a run checks at its start, in one process and without memory, and the plan it would follow."""

from pathlib import Path

from rich.table import Table

from cpt_mega.config import Config
from cpt_mega.config.schedule import LearningRate
from cpt_mega.engine.plan import plan_ranks
from cpt_mega.engine.platform import check_layout
from cpt_mega.errors import CheckpointError
from cpt_mega.gates.perplexity import open_eval_sets
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import ModelInfo, read_model_info
from cpt_mega.lineage import damaged_files, sealed_files
from cpt_mega.loop.console import make_console, sources_table
from cpt_mega.loop.session import open_data


def print_plan(config: Config, world: int) -> None:
    """Checks configuration, checkpoint, layout and data for ``world`` processes and prints what would happen.

    Raises InputError for the first thing that would stop the run.
    """
    start = locate_checkpoint(config.model.checkpoint, "model.checkpoint")
    damaged = damaged_files(start, sealed_files(start))
    if damaged:
        raise CheckpointError("model.checkpoint", str(start), f"damaged: {', '.join(damaged)}; import it again")
    info = read_model_info(start)
    check_layout(config, info.shape, world)
    sources, digest = open_data(config, info)
    sets = open_eval_sets(config, digest, info.shape.vocab_size)
    console = make_console()
    console.print(_model_table(config, info, world))
    console.print(_ranks_table(config, info, world))
    if sources:
        console.print(sources_table(sources))
    for held in sets:
        console.print(f" evaluates {held.bucket}: {held.name}, {int(held.plan.row_tokens.sum()):,} tokens")
    console.print(" everything checked; nothing was started", style="bold green")
    console.print(f" next: NPROC={world} bash launch/torchrun.sh CONFIG    (writes {Path(config.run.dir)})")


def _model_table(config: Config, info: ModelInfo, world: int) -> Table:
    p, train, rate = config.parallel, config.train, LearningRate.from_config(config)
    per_step = train.global_batch_size * train.seq_length
    table = Table(title="plan", title_justify="left", box=None, pad_edge=False, show_header=False)
    rows = {
        "model": f"{info.shape.family}, {info.shape.layers} layers, hidden {info.shape.hidden_size}, {config.precision}",
        "processes": f"{world}: TP {p.tp} x PP {p.pp} x DP {world // p.model_size}",
        "steps": f"about {-(-train.tokens // per_step):,} of {per_step:,} tokens",
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

"""What a user watches: Megatron's line at every log interval, and tables at the start and at looks."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpt_mega.checkpoint.restore import Restore
from cpt_mega.config import Config
from cpt_mega.data.sources import Source
from cpt_mega.engine.fast_paths import FastPath
from cpt_mega.gates.looks import looks_share, planned_looks
from cpt_mega.gates.suite import Suite

_COLOURS = {"restored": "green", "fresh": "cyan", "refused": "bold red", "accepted": "yellow", "harmless": "dim"}
MOST_ODD_ROWS = 5  # said on the console; a corpus may be full of them


def make_console() -> Console:
    """A console that is wide enough for tables in a log file and does not wrap Megatron's line.

    Without markup: commands and field names have brackets.
    """
    width = None if sys.stdout.isatty() else 160
    return Console(file=sys.stdout, width=width, soft_wrap=True, highlight=False, markup=False)


class Events:
    """Says on the console what happens to a run's data and updates: what the ledger has of it, in a sentence."""

    def __init__(self, console: Console):
        self.console, self._odd_rows = console, 0

    def __call__(self, line: dict) -> None:
        """Takes a line of the ledger; those of other kinds say nothing here."""
        says = {
            "weights": self._weights,
            "odd_row": self._odd_row,
            "anomaly": _anomaly,
            "verdict": _verdict,
            "anneal": _anneal,
        }
        words = says.get(line["kind"], lambda line: None)(line)
        about = {"anomaly": "guard", "verdict": "gates", "anneal": "gates"}.get(line["kind"], "data")
        if words:
            self.console.print(f" {about} at iteration {line['step']:8d} | {words}", style="yellow")

    def _weights(self, line: dict) -> str:
        if "dropped" in line:
            return f"source {line['dropped']} has been read out ({line['by']}); the others go on without it"
        total = sum(line["weights"].values())
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in line["weights"].items())
        return f"shares of tokens are now {shares} ({line.get('by', 'decided')})"

    def _odd_row(self, line: dict) -> str | None:
        self._odd_rows += 1
        if self._odd_rows > MOST_ODD_ROWS + 1:
            return None
        if self._odd_rows > MOST_ODD_ROWS:
            return "more odd rows: they are in ledger.jsonl"
        return f"row {line['row']} of {line['source']}: {line['problem']} ({line['action']})"


def _verdict(line: dict) -> str | None:
    """Of rules that object."""
    found = [one for one in line["verdicts"] if one["level"] != "none"]
    return "; ".join(f"{one['level']}, {one['action']}: {one['reason']}" for one in found) or None


def _anneal(line: dict) -> str:
    return f"the rate goes to zero until {line['ends_at']:,} tokens, where the run ends: {line['reason']}"


def _anomaly(line: dict) -> str:
    action = line["action"]
    if action in ("lower_lr", "restore_lr"):
        until = f" until iteration {line['calm_step']}" if "calm_step" in line else ""
        return f"learning rate x {line['lr_scale']:g} of the schedule's{until}"
    words = {"skip": "update refused", "clip": f"gradient scaled down to {line.get('most_norm', 0):.4g}"}
    to_blame = [row for row in line.get("rows", []) if row["blamed"]]
    rows = ", ".join(f"row {row['row']} of {row['source']}" for row in to_blame[:MOST_ODD_ROWS])
    return f"{words.get(action, 'only logged')}: {line['why']}" + (f" | {rows}" if rows else "")


def duration(seconds: float) -> str:
    """``1:02:03``, days as hours."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def step_line(
    *,
    step: int,
    last_step: int,
    samples: int,
    step_ms: float,
    lr: float,
    batch: int,
    loss: float,
    grad_norm: float,
    skipped: int,
    nans: int,
    tokens: int,
    tokens_per_s_device: float,
    wait_share: float,
    left_s: float,
) -> str:
    """Megatron's console line, with what a CPT run adds at its end. Consumed samples are packed rows."""
    return (
        f" iteration {step:8d}/{last_step:8d} | consumed samples: {samples:12d} |"
        f" elapsed time per iteration (ms): {step_ms:.1f} | learning rate: {lr:.6E} | global batch size: {batch:5d} |"
        f" lm loss: {loss:.6E} | grad norm: {grad_norm:.3f} | number of skipped iterations: {skipped:3d} |"
        f" number of nan iterations: {nans:3d} | consumed tokens: {tokens:,} | tokens/s/device: {tokens_per_s_device:,.0f} |"
        f" data wait: {wait_share:.1%} | time left: {duration(left_s)} |"
    )


def show_contract(console: Console, restore: Restore) -> None:
    """The restore contract, and what was passed over on the way to it."""
    title = f"restore: {restore.start.mode}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("item", "", "note"):
        table.add_column(name)
    for item, what, note in restore.rows:
        table.add_row(item, Text(what, _COLOURS.get(what, "")), note)
    console.print(table)
    for note in restore.start.notes:
        console.print(f" {note}", style="yellow")


def looks_lines(config: Config, suite: Suite) -> list[str]:
    """How often a run is looked at, what that costs, and how replies are asked for; ``gates.look_share`` bounds the part of
    ``gates.suite`` alone."""
    frames = [f" replies: {frame}" for frame in suite.frames]
    if not config.train.tokens:
        return [f" looks: one, of about {suite.tokens:,} tokens", *frames]
    words = f" looks: at step 0 and {planned_looks(config)} more, of about {suite.tokens:,} tokens"
    return [f"{words}: {looks_share(config, suite.tokens):.1%} of the computing", *frames]


def sources_table(sources: Sequence[Source], shares: Sequence[float]) -> Table:
    """The mixture, by its shares of all tokens of the run, what of its tokens counts, and how its documents fill rows."""
    table = Table(title="data", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    table.add_column("role")
    for name in ("share", "counts", "documents", "rows", "fill", "padding", "split", "a row", "most"):
        table.add_column(name, justify="right")
    for source, share in zip(sources, shares, strict=True):
        found = source.plan.statistics
        table.add_row(
            source.name,
            source.role,
            f"{share:.1%}",
            f"{source.counted_tokens / source.corpus.tokens:.1%}",
            f"{source.corpus.documents:,}",
            f"{found.rows:,}",
            f"{found.fill:.2%}",
            f"{found.padding:,}",
            f"{found.split_documents:,}",
            f"{found.documents_a_row:.1f}",
            f"{found.most_documents:,}",
        )
    return table


def fast_paths_table(paths: Sequence[FastPath]) -> Table:
    """Which fast ways the run takes, and why not the others."""
    table = Table(title="fast paths", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("path", "", "why, or the option"):
        table.add_column(name)
    for path in paths:
        table.add_row(path.name, Text("on", "green") if path.on else Text("off", "dim"), path.why)
    return table

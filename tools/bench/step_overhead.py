"""The cost of our layer: the trainer against a bare megatron-core loop, a plain loop over the transformers model, and
``transformers.Trainer``, on this machine's CPU.

One model, one batch, one set of optimizer settings, one thread a process (two cores in all). Every contender runs in processes
of its own, in turn within each round; a round's value is the median of its timed steps, and ratios are taken within a
round, so that a machine that slows down slows both sides. ``--json FILE`` keeps everything that was measured.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from contenders import ADAM, DEFAULT_SEQ_LENGTH, MODEL, ROWS, ROWS_AT_ONCE, bare_settings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHORTEST_STEP_MS = 300  # below this, what is measured is not a step that anybody has
LARGEST_LOSS_DIFFERENCE = 1e-4
LONGEST_RUN_S = 900
PACKAGES = ("torch", "megatron-core", "transformers", "accelerate", "numpy")
CONDITIONS = (
    f"{ROWS} rows a step in micro-batches of {ROWS_AT_ONCE}; one document fills each row, so that "
    "packed and plain rows are the same work. fp32, one thread a process."
)


@dataclass(frozen=True)
class Contender:
    """Who is measured: ``name`` in tables and JSON, the script's word for it, and its processes."""

    name: str
    word: str
    processes: int = 1

    @property
    def title(self) -> str:
        return f"{self.name}, {'1 process' if self.processes == 1 else f'TP {self.processes} with SP'}"


TRAINER_1, TRAINER_2 = Contender("trainer", "trainer"), Contender("trainer", "trainer", 2)
BARE_1, BARE_2 = Contender("bare megatron-core", "bare"), Contender("bare megatron-core", "bare", 2)
PLAIN = Contender("plain transformers loop", "plain")
TRANSFORMERS = Contender("transformers.Trainer", "transformers")
ALL = (TRAINER_1, BARE_1, PLAIN, TRANSFORMERS, TRAINER_2, BARE_2)

# (whose steps/s, over whose, the least it should be)
TARGETS = ((TRAINER_1, BARE_1, 0.97), (TRAINER_2, BARE_2, 0.97), (TRAINER_1, TRANSFORMERS, 1.0))


@dataclass(frozen=True)
class Spread:
    """A median and the range of what it was taken from."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def summarise(rounds: Sequence[dict[str, list[float]]]) -> tuple[dict[str, Spread], dict[tuple[str, str], Spread]]:
    """Milliseconds a step of each contender, and ratios of steps per second.

    Args:
        rounds: for each round, the timed steps (ms) of each contender by ``title``; who did not run is left out.

    Returns spreads over rounds of each round's median, and, for each pair of TARGETS that ran, of each round's ratio: above 1
    the first of the pair is the faster one.
    """
    medians = [{title: median(steps) for title, steps in one.items()} for one in rounds]
    titles = [contender.title for contender in ALL if all(contender.title in one for one in medians)]
    speeds = {title: Spread.of([one[title] for one in medians]) for title in titles}
    pairs = [(a.title, b.title) for a, b, _ in TARGETS if a.title in titles and b.title in titles]
    return speeds, {(a, b): Spread.of([one[b] / one[a] for one in medians]) for a, b in pairs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=CONDITIONS)
    parser.add_argument("--rounds", type=int, default=5, help="times that every contender runs (default 5)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument(
        "--seq-length",
        type=int,
        default=DEFAULT_SEQ_LENGTH,
        metavar="N",
        help=f"tokens a row (default {DEFAULT_SEQ_LENGTH})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.warmup) < 1:
        parser.error("--rounds, --steps and --warmup must be at least 1")
    if not 2 <= options.seq_length <= MODEL["max_position_embeddings"]:
        parser.error(f"--seq-length must lie between 2 and {MODEL['max_position_embeddings']}")
    folder = Path(tempfile.mkdtemp(prefix="cpt_mega_overhead_"))
    try:
        return measure(options, folder)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Runs all rounds, prints the tables, writes the JSON; 1 when the contenders did not compute the same."""
    console = Console(highlight=False)
    left_out = {} if importlib.util.find_spec("accelerate") else {TRANSFORMERS: "accelerate is not installed"}
    contenders = [contender for contender in ALL if contender not in left_out]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rounds = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("preparing", total=options.rounds * len(contenders))
        run(
            [
                sys.executable,
                str(HERE / "contenders.py"),
                "prepare",
                str(folder),
                "--seq-length",
                str(options.seq_length),
            ]
        )
        for number in range(1, options.rounds + 1):
            rounds.append({})
            for contender in contenders:
                progress.update(task, description=f"round {number}: {contender.title}")
                if not console.is_terminal:  # a bar shows nothing there
                    console.print(f"round {number} of {options.rounds}: {contender.title}")
                rounds[-1][contender.title] = run(command(contender, folder, options))
                progress.advance(task)
    steps = [{title: report["step_ms"] for title, report in one.items()} for one in rounds]
    speeds, ratios = summarise(steps)
    differences = loss_differences(rounds[0])
    print_tables(console, options.seq_length, speeds, ratios, differences, left_out)
    if options.json:
        write_json(options, rounds, speeds, ratios, differences)
    return 0 if max(differences.values(), default=0.0) <= LARGEST_LOSS_DIFFERENCE else 1


def command(contender: Contender, folder: Path, options: argparse.Namespace) -> list[str]:
    """What runs a contender; several processes through torchrun."""
    python = [sys.executable]
    if contender.processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(contender.processes)]
    if contender.word == "bare":
        settings = folder / f"bare_{contender.processes}.json"
        wanted = bare_settings(folder, options.seq_length, contender.processes, options.warmup, options.steps)
        settings.write_text(json.dumps(wanted))
        return [*python, str(HERE / "bare_core.py"), str(settings)]
    words = ["--tp", str(contender.processes), "--warmup", str(options.warmup), "--steps", str(options.steps)]
    return [*python, str(HERE / "contenders.py"), contender.word, str(folder), *words]


class RunFailed(Exception):
    """A contender that did not come to its end; the message holds the end of what it said."""


def run(words: list[str]) -> dict:
    """Runs a command with one thread a process; the JSON object of its last line, under ``step_ms`` and losses.

    Raises RunFailed. Whatever happens, none of its processes is left.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **threads, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True, **pipes)
    try:
        output, errors = child.communicate(timeout=LONGEST_RUN_S)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{' '.join(words)} took more than {LONGEST_RUN_S} s") from error
    finally:
        end_session(child)
    if child.returncode:
        raise RunFailed(f"{' '.join(words)} ended with exit code {child.returncode}:\n{(output + errors)[-3000:]}")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    report = json.loads(lines[-1]) if lines else {}
    return report["batches"]["rows"] if "batches" in report else report


def end_session(child: subprocess.Popen) -> None:
    """Ends a command that is still running, with all that it started: torchrun's workers have sessions of their own, so it
    is asked first."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def loss_differences(reports: dict[str, dict]) -> dict[str, float]:
    """How far each contender's loss of the first step (nats) lies from the trainer's in one process."""
    expected = reports[TRAINER_1.title]["first_loss"]
    losses = {title: report["first_loss"] for title, report in reports.items() if title != TRAINER_1.title}
    return {title: abs(loss - expected) for title, loss in losses.items() if loss is not None}


def print_tables(
    console: Console, seq_length: int, speeds: dict, ratios: dict, differences: dict, left_out: dict
) -> None:
    title = f"milliseconds a step of {ROWS} rows of {seq_length:,} tokens: median of rounds (range)"
    table = Table(title=title, title_justify="left", border_style="cyan")
    for name in ("", "ms", "steps/s", "first loss against the trainer's"):
        table.add_column(name)
    for contender in ALL:
        if contender in left_out:
            table.add_row(contender.title, f"[yellow]not run: {left_out[contender]}[/]", "", "")
            continue
        speed, difference = speeds[contender.title], differences.get(contender.title)
        said = "" if difference is None else f"{difference:.1e}"
        numbers = f"{speed.median:.0f} ({speed.least:.0f} to {speed.most:.0f})"
        table.add_row(contender.title, numbers, f"{1000 / speed.median:.3f}", said)
    console.print(table)
    console.print(ratios_table(ratios, left_out))
    console.print(CONDITIONS, style="dim")
    if min(speed.median for speed in speeds.values()) < SHORTEST_STEP_MS:
        console.print(
            f"steps are shorter than {SHORTEST_STEP_MS} ms: make MODEL in contenders.py larger", style="yellow"
        )
    if max(differences.values(), default=0.0) > LARGEST_LOSS_DIFFERENCE:
        console.print("the contenders do not compute the same: their first losses differ", style="bold red")


def ratios_table(ratios: dict, left_out: dict) -> Table:
    table = Table(title="steps/s, ratio within each round: median (range)", title_justify="left", border_style="cyan")
    for name in ("", "ratio", "target", ""):
        table.add_column(name)
    for ours, theirs, target in TARGETS:
        words = f"{ours.title} / {theirs.title}"
        if theirs in left_out:
            table.add_row(words, f"[yellow]not run: {left_out[theirs]}[/]", f"{target:.2f}", "")
            continue
        ratio = ratios[ours.title, theirs.title]
        verdict = "[green]yes[/]" if ratio.median >= target else "[bold red]NO[/]"
        table.add_row(words, f"{ratio.median:.3f} ({ratio.least:.3f} to {ratio.most:.3f})", f"{target:.2f}", verdict)
    return table


def write_json(options: argparse.Namespace, rounds: list, speeds: dict, ratios: dict, differences: dict) -> None:
    targets = {f"{a.title} / {b.title}": target for a, b, target in TARGETS}
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load_average": os.getloadavg()},
        "settings": {"model": MODEL, "adam": ADAM, "seq_length": options.seq_length, "warmup": options.warmup},
        "conditions": CONDITIONS,
        "ms_per_step": {title: vars(speed) for title, speed in speeds.items()},
        "ratios": {f"{a} / {b}": vars(ratio) for (a, b), ratio in ratios.items()},
        "targets": targets,
        "first_loss_differences": differences,
        "rounds": rounds,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())

"""What packing does to training: held-out loss against concatenate-and-chunk at equal tokens, and the cost of a real token.

Reads the folder that ``launch/quickstart.sh`` leaves. One part trains its base model on its docstrings in several orders,
once with each way of packing; everything else is equal, and the documents that are scored are whole. The other measures
seconds for each real token of the same documents in packed rows, in rows of one document each filled up with padding, and
in full rows without any boundary.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("concat", "best_fit")
CONFIG = "train.yaml"
# From the base model on: what a random one reaches differs more from seed to seed than packing can make up for.
ALONE = ["parallel.tp=1", "parallel.sp=false", "train.micro_batch_size=4", "optimizer.lr=1.0e-3"]
WARMUP = 2
PACKED, PADDED, UNBROKEN = "packed", "a document a row", "no boundaries"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what launch/quickstart.sh left")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each way of packing (default 4)")
    parser.add_argument("--tokens", type=int, default=500_000, help="of each run (default 500,000)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--steps", type=int, default=12, help="timed batches of each kind of rows (default 12)")
    parser.add_argument("--only-cost", action="store_true", help="the second part alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    console = Console(highlight=False)
    report = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version()}
    report |= {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    report["cost_us"] = measure_cost(options)
    console.print(cost_table(report["cost_us"]))
    if not options.only_cost:
        with tempfile.TemporaryDirectory(prefix="cpt_mega_packing_") as folder:
            report["losses"] = measure_losses(options, Path(folder), console)
        console.print(loss_table(report["losses"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_losses(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, list[float]]:
    """Held-out loss (nats a token) at the end of each run; both ways of one seed run side by side."""
    losses: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        with ThreadPoolExecutor(len(METHODS)) as both:
            found = both.map(lambda method, seed=seed: train(options, folder, method, seed), METHODS)
        for method, loss in zip(METHODS, found, strict=True):
            losses[method].append(loss)
        console.print(f"seed {seed}: " + ", ".join(f"{method} {losses[method][-1]:.4f}" for method in METHODS))
    return losses


def train(options: argparse.Namespace, folder: Path, method: str, seed: int) -> float:
    run = folder / f"{method}.{seed}"
    words = [f"run.dir={run}", f"data.packing={method}", f"train.seed={seed}", f"train.tokens={options.tokens}"]
    words += [f"train.seq_length={options.seq_length}", "logging.tensorboard=false", "logging.wandb='off'", *ALONE]
    words += [f"data.sources=[{{name: replay, path: {options.folder}/data/replay, role: replay}}]"]
    words += [
        f"eval.sets=[{{path: {options.folder}/data/general.heldout, bucket: general}}]",
        "gates.general_perplexity_limit=null",
    ]
    config = options.folder / CONFIG
    command = [sys.executable, "-m", "cpt_mega.train", "--config", str(config), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    readings = [line["value"] for line in lines if line["kind"] == "eval" and line["metric"] == "perplexity"]
    return math.log(readings[-1])


def measure_cost(options: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds of a step for each real target, batch by batch; the kinds of rows take turns."""
    from cpt_mega.config import load_config
    from cpt_mega.config.schema import ParallelOptions
    from cpt_mega.data.indexed import IndexedCorpus
    from cpt_mega.engine.mesh import start_mesh, stop_mesh
    from cpt_mega.engine.step import Engine
    from cpt_mega.hf.model_info import read_model_info

    config = load_config(str(options.folder / CONFIG), [f"train.seq_length={options.seq_length}", *ALONE])
    corpus, found = IndexedCorpus(options.folder / "data" / "replay"), {kind: [] for kind in (PACKED, PADDED, UNBROKEN)}
    mesh = start_mesh(ParallelOptions(), seed=1)
    try:
        engine = Engine(config, read_model_info(Path(config.model.checkpoint)).shape, mesh)
        for step, batches in enumerate(batches_of(corpus, options, config.train.global_batch_size)):
            for kind, batch in batches.items():
                prepared = engine.prepare(len(batch), batch.__getitem__)
                begun = time.perf_counter()
                engine.train_step(prepared, lambda peak, floor: 0.0).wait()
                if step >= WARMUP:
                    targets = sum(float(row.loss_mask.sum()) for row in batch)
                    found[kind].append((time.perf_counter() - begun) * 1e6 / targets)
    finally:
        stop_mesh()
    return found


def batches_of(corpus, options: argparse.Namespace, rows: int) -> Iterator[dict]:
    """For each step a batch of each kind of rows."""
    from cpt_mega.data.packing import plan_rows
    from cpt_mega.data.rows import build_row

    plan = plan_rows(corpus.document_lengths, options.seq_length)
    fitting = [index for index, length in enumerate(corpus.document_lengths) if length <= options.seq_length]
    for step in range(options.steps + WARMUP):
        packed = [build_row(corpus, plan, row, options.seq_length) for row in range(step * rows, (step + 1) * rows)]
        alone = [alone_in_a_row(corpus, document, options.seq_length) for document in fitting[step * rows :][:rows]]
        unbroken = [replace(row, doc_lengths=[len(row.ids)]) for row in packed]
        yield {PACKED: packed, PADDED: alone, UNBROKEN: unbroken}


def alone_in_a_row(corpus, document: int, seq_length: int):
    """A document and padding."""
    from cpt_mega.data.packing import plan_rows
    from cpt_mega.data.rows import build_row

    lengths = corpus.document_lengths * 0
    lengths[document] = corpus.document_lengths[document]
    return build_row(corpus, plan_rows(lengths, seq_length), 0, seq_length)


def cost_table(cost: dict[str, list[float]]) -> Table:
    table = Table(title="a training step, for each real target", title_justify="left")
    for name in ("rows", "microseconds", f"of {UNBROKEN}"):
        table.add_column(name, justify="left" if name == "rows" else "right")
    for kind, values in cost.items():
        ratios = [one / other for one, other in zip(values, cost[UNBROKEN], strict=True)]
        shown = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(kind, f"{median(values):.0f}", shown)
    return table


def loss_table(losses: dict[str, list[float]]) -> Table:
    table = Table(title="held-out loss at equal tokens (nats a token)", title_justify="left")
    for name in ("packing", "mean", "standard deviation over seeds"):
        table.add_column(name, justify="left" if name == "packing" else "right")
    for method, values in losses.items():
        table.add_row(method, f"{mean(values):.4f}", f"{stdev(values) if len(values) > 1 else 0:.4f}")
    apart = [best - concat for concat, best in zip(*losses.values(), strict=True)]
    spread = f"{min(apart):+.4f} to {max(apart):+.4f} over {len(apart)} seeds"
    table.caption = f"best_fit - concat, seed by seed: {mean(apart):+.4f} ({spread})"
    return table


if __name__ == "__main__":
    raise SystemExit(main())

"""Does the guard leave healthy runs alone, and does it see every planted spike?

    python tools/bench/anomalies.py [--seeds 20] [--steps 2000] [--rows 32]

Trains a tiny Llama on bytes of Python's own library, anew for each seed, and only logs what the guard finds: alarms there are
false. Then, on the recorded losses and norms, a spike is planted at each of some steps (the loss times three, the gradient
with it or left as it was), and the guard judges that step after the ones before it. Thresholds are the defaults throughout.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cpt_mega.config.schema import AnomalyOptions
from cpt_mega.gates.anomaly import SKIP, AnomalyState, accept, first_losses, judge

ROOT = Path(__file__).resolve().parent.parent.parent
SEQ_LENGTH, VOCABULARY = 64, 257
TRAIN = """\
run: {{dir: {folder}/run}}
model: {{checkpoint: {folder}/import}}
precision: fp32
train: {{tokens: {tokens}, seq_length: 64, global_batch_size: {rows}, micro_batch_size: {rows}}}
optimizer: {{lr: 3.0e-3}}
data: {{sources: [{{name: code, path: {folder}/code, role: domain}}]}}
eval: {{max_tokens: 4096, sets: [{{path: {folder}/heldout, bucket: domain}}]}}
gates: {{general_perplexity_limit: null, max_overlap: null}}  # 13 tokens are 13 bytes here
anomaly: {{action: log}}
logging: {{interval_steps: 100, tensorboard: false}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="healthy runs (20)")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each (2000)")
    parser.add_argument("--rows", type=int, default=32, help="of 64 tokens, a step (32)")
    parser.add_argument("--spikes", type=int, default=200, help="steps of each run at which one is planted (200)")
    parser.add_argument("--factor", type=float, default=3.0, help="what the loss is multiplied by there (3)")
    parser.add_argument("--json", type=Path, help="also writes every run's losses, norms and findings")
    options = parser.parse_args()
    console, begin = Console(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anomalies_") as name, ThreadPoolExecutor(2) as two:
        prepare(Path(name), options.steps, options.rows)
        found = []
        for seed, run in enumerate(two.map(lambda seed: train(Path(name), seed), range(options.seeds))):
            found.append(run)
            left = (time.monotonic() - begin) / (seed + 1) * (options.seeds - seed - 1)
            console.print(f"seed {seed}: {run['said']}; {left:.0f} s left")
    console.print(table(options, found))
    if options.json is not None:
        options.json.write_text(json.dumps(found))
    console.print(
        f"Python {platform.python_version()}, torch {version('torch')}, megatron-core {version('megatron-core')}"
    )
    return int(any(run["alarms"] for run in found) or missed(options, found) > 0)


def prepare(folder: Path, steps: int, rows: int) -> None:
    """A random tiny Llama as an import, two corpora of bytes, a configuration."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cpt_mega.data.indexed_writer import IndexedCorpusWriter
    from cpt_mega.hf.convert import import_hf

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "import")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for name, part in (("heldout", files[::20]), ("code", [file for file in files if file not in files[::20]])):
        with IndexedCorpusWriter(str(folder / name), np.uint16) as writer:
            for file in part:
                writer.add(np.append(np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint16) + 1, 0))
    (folder / "train.yaml").write_text(TRAIN.format(folder=folder, tokens=steps * rows * SEQ_LENGTH, rows=rows))


def train(folder: Path, seed: int) -> dict:
    """One run: its losses and norms by step, its step-0 reading, and what its guard wrote down."""
    run = folder / f"run.{seed}"
    words = ["--config", str(folder / "train.yaml"), f"run.dir={run}", f"train.seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "cpt_mega.train", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    steps = [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    wrote = [line for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines()) if "why" in line]
    perplexity = next(line["value"] for line in lines if line["kind"] == "eval")
    scaled = [line for line in wrote if line["would"] != SKIP]
    said = f"{len(steps)} steps, loss {steps[0][0]:.2f} to {steps[-1][0]:.2f}, "
    said += f"{len(wrote) - len(scaled)} alarms, {len(scaled)} gradients scaled down"
    for line in wrote:
        said += f"\n    step {line['step']}: {line['would']}, {line['why']}"
    return {
        "steps": steps,
        "baseline": {"domain": perplexity},
        "alarms": len(wrote) - len(scaled),
        "scaled": len(scaled),
        "said": said,
    }


def planted(options: argparse.Namespace, seed: int, run: dict) -> tuple[int, int]:
    """Spikes planted in a run, and those of them that were seen."""
    draw, guard, state = random.Random(seed), AnomalyOptions(), AnomalyState()
    at = {*range(1, 17), *draw.sample(range(1, len(run["steps"]) + 1), min(options.spikes, len(run["steps"])))}
    expected = first_losses(run["baseline"], VOCABULARY)
    tried = seen = 0
    for step, (loss, norm) in enumerate(run["steps"], 1):
        if step in at:
            for times in (1.0, options.factor):  # a spike of the loss alone, or of the gradient too
                tried += 1
                seen += judge(state, guard, expected, options.factor * loss, times * norm).what == SKIP
        accept(state, guard, step, loss, norm)
    return tried, seen


def missed(options: argparse.Namespace, found: list[dict]) -> int:
    counts = [planted(options, seed, run) for seed, run in enumerate(found)]
    return sum(tried - seen for tried, seen in counts)


def table(options: argparse.Namespace, found: list[dict]) -> Table:
    steps = sum(len(run["steps"]) for run in found)
    tried = sum(planted(options, seed, run)[0] for seed, run in enumerate(found))
    shown = Table(title="the guard, at its default thresholds", title_justify="left")
    for name in ("healthy runs", "steps", "alarms", "gradients scaled down", "spikes planted", "not seen"):
        shown.add_column(name, justify="right")
    row = (len(found), steps, sum(run["alarms"] for run in found), sum(run["scaled"] for run in found))
    shown.add_row(*(f"{value:,}" for value in (*row, tried, missed(options, found))))
    return shown


if __name__ == "__main__":
    sys.exit(main())

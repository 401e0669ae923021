"""What a checkpoint costs: how long the training is held by a save that it waits for and by one beside it; saving and loading
against ``cp`` and ``torch.save`` of the same bytes.

One random Llama, trained by the trainer's own command with a checkpoint every few steps, once with
``checkpoint.asynchronous`` off and on; everything on this machine's disk, through the page cache, as ``cp`` has it.
``--json FILE`` keeps everything that was measured.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

TRAIN = """\
run: {{dir: {folder}/run}}
model: {{checkpoint: {folder}/import}}
precision: {precision}
train: {{tokens: {tokens}, seq_length: {seq}, global_batch_size: {rows}, micro_batch_size: 1, replica_check_steps: null}}
optimizer: {{lr: 1.0e-5}}
schedule: {{kind: constant, warmup_tokens: 0}}
data: {{sources: [{{name: random, path: {folder}/corpus, role: domain}}]}}
checkpoint: {{interval_tokens: {interval}, keep_permanent: 1}}
logging: {{tensorboard: false, interval_steps: 1}}
"""
VOCABULARY = 32_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    parser.add_argument("--layers", type=int, default=16, help="layers (default 16)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step (default 1)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--steps", type=int, default=21, help="steps of a run (default 21)")
    parser.add_argument("--every", type=int, default=10, help="steps between saves (default 10)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--folder", type=Path, help="where to work; needs room for four checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(options, Path(name), console)
    console.print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict:
    """Runs everything; returns seconds and sizes."""
    parameters = prepare(options, folder)
    found: dict = {"options": {**vars(options), "folder": None, "json": None}, "parameters": parameters}
    found["versions"] = {name: version(name) for name in ("torch", "megatron-core")}
    for mode in ("waiting", "background"):
        console.print(f"training {options.steps} steps, {mode}")
        shutil.rmtree(folder / "run", ignore_errors=True)
        found[mode] = train(folder, f"checkpoint.asynchronous={str(mode == 'background').lower()}")
    checkpoint = max((folder / "run" / "checkpoints").glob("iter_*"))
    found["bytes"] = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    console.print("loading, copying, torch.save")
    found["load_s"] = restore_seconds(folder)
    found["cp_s"] = median(copied(checkpoint, folder / "copy"))
    found |= torch_seconds(checkpoint, folder / "plain.pt")
    found["fingerprint_s"] = fingerprint_seconds(4 * parameters)  # weights, master weights, two moments
    return found


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """A random Llama as an import, a corpus, a configuration; returns the model's parameters."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cpt_mega.data.indexed_writer import IndexedCorpusWriter
    from cpt_mega.hf.convert import import_hf

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 27 // 10 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64 // 4 or 1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "import")
    shutil.rmtree(folder / "hf")
    draw = np.random.default_rng(1)
    with IndexedCorpusWriter(str(folder / "corpus"), np.uint16) as writer:
        for _ in range(4 * options.rows * options.steps):
            writer.add(draw.integers(1, VOCABULARY, options.seq_length).astype(np.uint16))
    tokens = options.steps * options.rows * options.seq_length
    interval = options.every * options.rows * options.seq_length
    words = {"folder": folder, "tokens": tokens, "interval": interval, "seq": options.seq_length, "rows": options.rows}
    (folder / "train.yaml").write_text(TRAIN.format(precision=options.precision, **words))
    return sum(parameter.numel() for parameter in model.parameters())


def train(folder: Path, *overrides: str) -> dict:
    """One run; seconds of its steps and of its saves, but for the last, which is always waited for, and the one before, for
    which that one waits."""
    started = time.perf_counter()
    run_trainer(folder, *overrides)
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = [line for line in lines if line["kind"] == "checkpoint"][:-2]
    steps = [line["forward_backward_s"] + line["optimizer_s"] for line in lines if line["kind"] == "train"]
    return {
        "run_s": seconds,
        "step_s": steps,
        "held_s": [line["held_s"] for line in saves],
        "save_s": [line["seconds"] for line in saves],
    }


def run_trainer(folder: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "cpt_mega.train", "--config", str(folder / "train.yaml"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the trainer ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def restore_seconds(folder: Path) -> float:
    """What a finished run's next start takes to load its state: strictly checked, weights, moments and generators."""
    told = re.search(r"restore (\d+\.\d)", run_trainer(folder))
    return float(told[1])


def copied(source: Path, target: Path, times: int = 3) -> Iterator[float]:
    """Seconds of ``cp -r``."""
    for _ in range(times):
        shutil.rmtree(target, ignore_errors=True)
        begin = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        yield time.perf_counter() - begin
    shutil.rmtree(target)


def torch_seconds(checkpoint: Path, file: Path) -> dict[str, float]:
    """``torch.save`` and ``torch.load`` of the same tensors as one file."""
    import torch

    from cpt_mega.hf.torch_dist import read_index

    tensors = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype) for key, entry in read_index(checkpoint).items()
    }
    begin = time.perf_counter()
    torch.save(tensors, file)
    saved = time.perf_counter()
    del tensors
    loading = time.perf_counter()
    torch.load(file)
    return {"torch_save_s": saved - begin, "torch_load_s": time.perf_counter() - loading}


def fingerprint_seconds(elements: int) -> float:
    """What the fingerprints of so many elements take, measured on a part of them."""
    import torch

    from cpt_mega.hf.fingerprint import fingerprint

    torch.set_num_threads(1)
    values = torch.randn(min(elements, 1 << 26))
    begin = time.perf_counter()
    fingerprint(values, (0,), values.shape)
    return (time.perf_counter() - begin) * elements / values.numel()


def table(found: dict) -> Table:
    """What a reader wants to know."""
    shown = Table(title=f"checkpoints of {found['parameters'] / 1e6:,.0f} M parameters, {found['bytes'] / 1e9:.2f} GB")
    shown.add_column("what")
    shown.add_column("seconds", justify="right")
    held = {mode: median(found[mode]["held_s"]) for mode in ("waiting", "background")}
    step, every = median(found["waiting"]["step_s"]), found["options"]["every"]
    slowed = sum(seconds - step for seconds in found["background"]["step_s"][every : 2 * every])
    rows = {
        "a step": step,
        "held by a save that is waited for": held["waiting"],
        "held by a save in the background": held["background"],
        f"  that is {held['waiting'] / held['background']:.1f} times less": None,
        "a save in the background, to its end": median(found["background"]["save_s"]),
        "by which the steps beside it took longer, in all": slowed,
        "fingerprints of live tensors": found["fingerprint_s"],
        f"  that is {found['fingerprint_s'] / step:.1%} of a step": None,
        "cp of the same bytes": found["cp_s"],
        "torch.save of the same tensors": found["torch_save_s"],
        "load, checked": found["load_s"],
        "torch.load": found["torch_load_s"],
    }
    for name, seconds in rows.items():
        shown.add_row(name, "" if seconds is None else f"{seconds:.2f}")
    return shown


if __name__ == "__main__":
    sys.exit(main())

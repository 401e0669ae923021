"""Section 4: tokens per second of layers as large as an 8B model's, the trainer's engine against a bare megatron-core loop."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import small
import torch
from mfu import FORMULA, PEAKS, Sizes, flops_per_token, mfu

from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.model import transformer_config
from cpt_mega.engine.precision import check_precision, is_fp8, precision_fields
from cpt_mega.errors import InputError
from cpt_mega.hf.rope import RopeShape
from cpt_mega.hf.shape import ModelShape

TITLE = "throughput of 8B-shaped layers"
HERE = Path(__file__).resolve().parent
ENGINE, BARE = HERE / "engine_loop.py", HERE.parent / "bare_core.py"
PRECISIONS = ("bf16", "fp8-tensorwise", "fp8-delayed", "fp8-blockwise", "mxfp8")
# Rows of one document, packed rows, and packed rows that are others at every step, as they are in a run: kernels of attention
# that are chosen by the documents' lengths are chosen anew. The bare loop has one batch, so it does not have the last.
CHANGING = "packed, changing"
BATCHES = ("single", "packed", CHANGING)
OF_BARE, OF_BF16, OF_SINGLE = 0.98, 1.25, 1.0  # targets: engine / bare core, FP8 / bf16, packed / single documents
OPTIMIZER = {"lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
CORE_NAMES = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_eps", "clip_norm": "clip_grad"}
KERNELS = (
    *("bias_activation_fusion", "apply_rope_fusion", "masked_softmax_fusion", "cross_entropy_loss_fusion"),
    *("cross_entropy_fusion_impl", "gradient_accumulation_fusion"),
)
LOSS_APART = 0.02  # nats, between the two loops at the first step and at the last
LONGEST_RUN_S = 300


@dataclass(frozen=True)
class Load:
    """What is computed. ``layers`` are tried in turn until one fits; ``rows`` of one micro-batch each make a step."""

    sizes: Sizes
    layers: tuple[int, ...]
    seq_length: int
    rows: int
    warmup: int
    steps: int
    shortest_document: int

    def shape(self) -> ModelShape:
        s = self.sizes
        return ModelShape(
            family="llama",
            layers=s.layers,
            hidden_size=s.hidden,
            ffn_hidden_size=s.ffn,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            vocab_size=s.vocab,
            max_positions=self.seq_length,
            norm_eps=1e-5,
            rope=RopeShape(500_000.0),
            tied_embeddings=False,
        )


# Llama 3 8B's layer.
LLAMA_8B = Sizes(layers=8, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128_256)
ON_GPU = Load(LLAMA_8B, (8, 6, 4, 2), 8192, rows=4, warmup=3, steps=8, shortest_document=64)
TINY = Sizes(layers=2, hidden=64, ffn=192, heads=4, kv_heads=2, head_dim=16, vocab=256)
ON_CPU = Load(TINY, (2,), 128, rows=2, warmup=1, steps=3, shortest_document=8)


class OutOfMemory(Exception):
    """A run that the device's memory does not hold."""


class RunFailed(Exception):
    """A run that did not come to its end; the message holds the end of what it said."""


def run(mesh: Mesh, smoke: bool) -> dict:
    """Every supported precision by the engine, bf16 and the first FP8 by the bare loop as well, on the same batches."""
    load = ON_CPU if smoke else ON_GPU
    precisions, notes = _supported()
    with tempfile.TemporaryDirectory(prefix="cpt_mega_gpu_") as name:
        folder = Path(name)
        lengths = _write_batches(folder, load)
        load = _largest(load, folder, precisions)
        found, failed = _measure_all(load, folder, precisions)
    rates = _rates(load, found)
    lines, missed = _targets(rates, precisions)
    failed += _unequal(found) + ([] if smoke else missed)
    notes = [*lines, *_words(load, lengths), *notes, *(["on a CPU the targets decide nothing"] if smoke else [])]
    columns = ["loop", "precision", "rows", "ms a step", "tokens/s", "MFU", "peak memory"]
    return {"columns": columns, "rows": _table(load, lengths, found, rates), "failed": failed, "notes": notes}


def _measure_all(load: Load, folder: Path, precisions: list[str]) -> tuple[dict, list[str]]:
    """Reports by (loop, precision), and what went wrong with the others: one that fails says nothing of the next."""
    found, failed = {}, []
    runs = [("engine", precision) for precision in precisions]
    runs += [("bare core", precision) for precision in precisions[:2]]
    for who in sorted(
        runs, key=lambda who: precisions.index(who[1])
    ):  # the two loops of a precision one after the other
        try:
            found[who] = _measure(load, folder, *who, load.steps)
        except (RunFailed, OutOfMemory) as error:
            failed.append(f"{', '.join(who)}: {error}")
    return found, failed


def _supported() -> tuple[list[str], list[str]]:
    """Precisions of this device, bf16 first, and why the others are not."""
    precisions, notes = [], []
    for precision in PRECISIONS:
        try:
            check_precision(small.small_config(precision, 128))
            precisions.append(precision)
        except InputError as error:
            notes.append(f"not run: {error}")
    return precisions, notes


def _write_batches(folder: Path, load: Load) -> dict[str, list[int]]:
    """A file for each of BATCHES, in the form of ``bare_core.py``: a micro-batch a row. Returns all documents' lengths."""
    draw, lengths = np.random.default_rng(4), {}
    for name in BATCHES:
        count = load.rows * (load.warmup + load.steps if name == CHANGING else 1)
        rows = [small.random_row(draw, load.sizes.vocab, _documents(draw, load, name)) for _ in range(count)]
        torch.save([_micro_batch(row) for row in rows], folder / f"{name}.pt")
        lengths[name] = [length for row in rows for length in row.doc_lengths]
    return lengths


def _documents(draw: np.random.Generator, load: Load, name: str) -> list[int]:
    if name == "single":
        return [load.seq_length]
    return small.document_lengths(draw, load.seq_length, load.shortest_document)


def _micro_batch(row) -> dict:
    values = {"ids": row.ids, "labels": row.labels, "mask": row.loss_mask}
    bounds = torch.tensor([0, *np.cumsum(row.doc_lengths)], dtype=torch.int32)
    tensors = {name: torch.from_numpy(np.asarray(value))[None] for name, value in values.items()}
    return {**tensors, "bounds": bounds, "longest": max(row.doc_lengths)}


def _unequal(found: dict) -> list[str]:
    """Where the two loops do not compute the same: they draw their weights from one seed and train on one batch."""
    wrong = []
    for loop, precision in found:
        theirs = found.get(("bare core", precision), found[loop, precision])["batches"]
        for batch, report in found[loop, precision]["batches"].items():
            apart = max(abs(report[step] - theirs.get(batch, report)[step]) for step in ("first_loss", "last_loss"))
            if not apart <= LOSS_APART:
                wrong.append(f"{loop}, {precision}, {batch}: losses are {apart:.3f} nats from the bare loop's")
    return wrong


def _largest(load: Load, folder: Path, precisions: list[str]) -> Load:
    """The load with as many layers as fit, tried with what takes the most memory: FP8 keeps a second copy of weights.

    Raises OutOfMemory when none of them does.
    """
    hungriest = precisions[min(1, len(precisions) - 1)]
    for layers in load.layers:
        candidate = replace(load, sizes=replace(load.sizes, layers=layers))
        try:
            _measure(candidate, folder, "engine", hungriest, steps=1)
            return candidate
        except OutOfMemory:
            continue
        except RunFailed:  # is said where it is measured
            return candidate
    raise OutOfMemory(f"not even {load.layers[-1]} layers fit")


def _measure(load: Load, folder: Path, loop: str, precision: str, steps: int) -> dict:
    """One process, its batches in turn; it inherits the variables that were set for CUDA. Raises OutOfMemory or RunFailed."""
    wanted = _engine_settings(load, precision) if loop == "engine" else _bare_settings(load, precision)
    batches = {name: str(folder / f"{name}.pt") for name in BATCHES if loop == "engine" or name != CHANGING}
    path = folder / "settings.json"
    path.write_text(json.dumps({**wanted, "batches": batches, "warmup": load.warmup, "steps": steps}))
    words = [sys.executable, str(ENGINE if loop == "engine" else BARE), str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(words, env={**os.environ, "PYTHONWARNINGS": "ignore"}, start_new_session=True, **pipes)
    try:
        output, errors = child.communicate(timeout=LONGEST_RUN_S)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"took more than {LONGEST_RUN_S} s") from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        if "OutOfMemoryError" in errors or "out of memory" in errors:
            raise OutOfMemory(f"out of memory with {load.sizes.layers} layers")
        raise RunFailed(f"exit code {child.returncode}\n{errors[-4000:]}")
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def _engine_settings(load: Load, precision: str) -> dict:
    train = {"tokens": 0, "seq_length": load.seq_length, "global_batch_size": load.rows, "micro_batch_size": 1}
    places = {"run": {"dir": "."}, "model": {"checkpoint": "."}}
    config = {**places, "precision": precision, "train": train, "optimizer": OPTIMIZER}
    return {"config": config, "shape": load.shape().to_json()}


def _bare_settings(load: Load, precision: str) -> dict:
    """The same model, kernels and optimizer as the engine's."""
    s, core = load.sizes, transformer_config(small.small_config(precision, load.seq_length), load.shape())
    return {
        "core": {
            "num_layers": s.layers,
            "hidden_size": s.hidden,
            "ffn_hidden_size": s.ffn,
            "num_attention_heads": s.heads,
            "num_query_groups": s.kv_heads,
            "kv_channels": s.head_dim,
            "layernorm_epsilon": 1e-5,
            **{name: getattr(core, name) for name in KERNELS},
            **{name: value for name, value in precision_fields(precision).items() if name.startswith("fp8")},
        },
        "model": {
            "vocab_size": s.vocab,
            "max_sequence_length": load.seq_length,
            "rotary_base": 500_000,
            "share_embeddings_and_output_weights": False,
        },
        "bf16": True,
        "optimizer": {CORE_NAMES.get(name, name): value for name, value in OPTIMIZER.items()},
        "checkpoint": None,
    }


def _rates(load: Load, found: dict) -> dict[tuple[str, str, str], float]:
    """Tokens per second by (loop, precision, batch)."""
    tokens = load.rows * load.seq_length
    return {
        (*who, batch): 1000 * tokens / median(report["step_ms"])
        for who, result in found.items()
        for batch, report in result["batches"].items()
    }


def _table(load: Load, lengths: dict, found: dict, rates: dict) -> list[list[str]]:
    rows = []
    for (loop, precision, batch), rate in rates.items():
        times = found[loop, precision]["batches"][batch]["step_ms"]
        used, peak = mfu(load.sizes, lengths[batch], rate, precision), found[loop, precision]["peak_memory_gib"]
        milliseconds = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        rows.append([loop, precision, batch, milliseconds, f"{rate:,.0f}", f"{used:.1%}", f"{peak:.1f} GiB"])
    return rows


def _targets(rates: dict, precisions: list[str]) -> tuple[list[str], list[str]]:
    """Each ratio beside its target, in words, and those that miss it; of the pairs that ran."""
    fp8 = [p for p in precisions if is_fp8(p) and ("engine", p, "single") in rates]
    pairs = []
    for batch in ("single", "packed"):
        pairs += [(("engine", p, batch), ("bare core", p, batch), OF_BARE) for p in precisions]
        if fp8:
            best = max(fp8, key=lambda p: rates["engine", p, batch])
            pairs.append((("engine", best, batch), ("engine", "bf16", batch), OF_BF16))
    for batch in (CHANGING, "packed"):
        pairs += [(("engine", p, batch), ("engine", p, "single"), OF_SINGLE) for p in precisions]
    ratios = [(a, b, rates[a] / rates[b], target) for a, b, target in pairs if a in rates and b in rates]
    lines = {
        f"{', '.join(a)} / {', '.join(b)}: {r:.3f}, target {target:.2f}": r >= target for a, b, r, target in ratios
    }
    return list(lines), [line for line, reached in lines.items() if not reached]


def _words(load: Load, lengths: dict) -> list[str]:
    s = load.sizes
    heads = f"{s.heads} heads of {s.head_dim}, {s.kv_heads} for keys and values"
    documents = len(lengths["packed"]) / load.rows
    gflops = {batch: flops_per_token(s, n) / 1e9 for batch, n in lengths.items()}
    return [
        f"{s.layers} layers of hidden {s.hidden}, ffn {s.ffn}, {heads}, vocabulary {s.vocab}",
        f"{load.rows} rows of {load.seq_length} tokens a step, a row a micro-batch; packed rows hold {documents:.0f} documents "
        f"on average and no filling; medians of {load.steps} steps after {load.warmup}",
        f"{FORMULA} Here {gflops['single']:.2f} GFLOP a token for single documents, {gflops['packed']:.2f} packed.",
        "peaks: " + ", ".join(f"{name} {peak / 1e12:.0f} TFLOP/s dense" for name, peak in PEAKS.items()),
        "the bare loop keeps its batch in the device's memory and overlaps no communication: there is one GPU",
    ]

"""Who is measured by ``step_overhead.py``, but for the bare loop: one contender a process, over one model and one batch.

``contenders.py prepare DIR`` makes what they share; ``contenders.py NAME DIR`` runs one and prints one line of JSON last:
``step_ms`` (from the end of each timed step to the end of the next), ``first_loss`` and ``last_loss`` (nats).
Heavy imports stand inside functions: the trainer's checkpoint writer starts a helper that imports this file again.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MODEL = {
    "vocab_size": 4096,  # a multiple of 128: nobody computes a row of padding
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
ROWS, ROWS_AT_ONCE = 2, 1  # ROWS_AT_ONCE: the micro-batch
DEFAULT_SEQ_LENGTH = 2048
ADAM = {"lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
EOS = 0

# Everything that is not said here is as shipped.
TRAIN = """\
run: {{dir: {folder}/run}}
model: {{checkpoint: {folder}/import}}
precision: fp32
train: {{tokens: 1, seq_length: {seq}, global_batch_size: {rows}, micro_batch_size: {rows_at_once}}}
optimizer: {adam}
schedule: {{kind: constant, warmup_tokens: 0}}
data: {{sources: [{{name: random, path: {folder}/corpus, role: domain}}]}}
logging: {{tensorboard: false}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="One contender of step_overhead.py.")
    parser.add_argument("contender", choices=["prepare", *CONTENDERS])
    parser.add_argument("folder", type=Path, help="what `prepare` makes and the others read")
    parser.add_argument("--seq-length", type=int, default=DEFAULT_SEQ_LENGTH, help="tokens a row, said to `prepare`")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size; as many processes, under torchrun")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    options = parser.parse_args()
    if options.contender == "prepare":
        prepare(options.folder, options.seq_length)
        return 0
    report = CONTENDERS[options.contender](options.folder, options.tp, options.warmup, options.steps)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(report), flush=True)
    return 0


def prepare(folder: Path, seq_length: int) -> None:
    """A random Llama as a Hugging Face folder and as an import, a corpus of one batch, and that batch as tensors.

    Each document fills a row, so that packed and plain rows are the same work; each epoch of the trainer is one batch, so
    that all contenders train on the same rows at every step (in another order within the batch).
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from cpt_mega.data.indexed_writer import IndexedCorpusWriter
    from cpt_mega.hf.convert import import_hf

    disable_progress_bar()
    torch.manual_seed(20)
    LlamaForCausalLM(LlamaConfig(**MODEL, bos_token_id=None, eos_token_id=EOS)).save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "import")
    draw = np.random.default_rng(20)
    ids = draw.integers(1, MODEL["vocab_size"], (ROWS, seq_length))
    ids[:, -1] = EOS
    with IndexedCorpusWriter(str(folder / "corpus"), np.uint16) as writer:
        for row in ids:
            writer.add(row.astype(np.uint16))
    torch.save(torch.from_numpy(ids), folder / "ids.pt")
    torch.save(_packed_rows(torch.from_numpy(ids)), folder / "batch.pt")
    words = {"folder": folder, "seq": seq_length, "rows": ROWS, "rows_at_once": ROWS_AT_ONCE, "adam": json.dumps(ADAM)}
    (folder / "train.yaml").write_text(TRAIN.format(**words))


def _packed_rows(ids) -> list[dict]:
    """[rows, S] token ids as the micro-batches that ``bare_core.py`` takes: [1, rows at once * S], one document a row."""
    import torch

    labels, mask = torch.roll(ids, -1, 1), torch.ones(ids.shape)
    labels[:, -1], mask[:, -1] = 0, 0
    seq_length = ids.shape[1]
    groups = zip(*(x.split(ROWS_AT_ONCE) for x in (ids, labels, mask)), strict=True)
    bounds = torch.arange(0, ROWS_AT_ONCE + 1, dtype=torch.int32) * seq_length
    names = ("ids", "labels", "mask")
    return [
        {
            **{name: x.reshape(1, -1) for name, x in zip(names, group, strict=True)},
            "bounds": bounds,
            "longest": seq_length,
        }
        for group in groups
    ]


def bare_settings(folder: Path, seq_length: int, tp: int, warmup: int, steps: int) -> dict:
    """What ``bare_core.py`` reads: the same model, weights, batch and optimizer as the other contenders'."""
    return {
        "core": {
            "num_layers": MODEL["num_hidden_layers"],
            "hidden_size": MODEL["hidden_size"],
            "ffn_hidden_size": MODEL["intermediate_size"],
            "num_attention_heads": MODEL["num_attention_heads"],
            "num_query_groups": MODEL["num_key_value_heads"],
            "layernorm_epsilon": 1e-6,
            "bias_activation_fusion": True,
            "apply_rope_fusion": True,
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
        },
        "model": {
            "vocab_size": MODEL["vocab_size"],
            "max_sequence_length": seq_length,
            "share_embeddings_and_output_weights": False,
        },
        "bf16": False,
        "optimizer": {
            "lr": ADAM["lr"],
            "weight_decay": ADAM["weight_decay"],
            "adam_beta1": ADAM["beta1"],
            "adam_beta2": ADAM["beta2"],
            "adam_eps": ADAM["eps"],
            "clip_grad": ADAM["clip_norm"],
        },
        "checkpoint": str(folder / "import"),
        "batches": {"rows": str(folder / "batch.pt")},
        "warmup": warmup,
        "steps": steps,
    }


def run_trainer(folder: Path, tp: int, warmup: int, steps: int) -> dict:
    """The trainer as its command runs it, in a run folder of its own; the wall between the ends of its steps."""
    import torch

    from cpt_mega.loop.callbacks import NullCallback
    from cpt_mega.loop.trainer import Trainer
    from cpt_mega.train import main as train

    marks: list[float] = []

    class Stopwatch(NullCallback):
        def on_boundary(self, trainer, tokens: int) -> None:
            marks.append(time.perf_counter())

    run = Trainer.run

    def watched(trainer: Trainer):
        trainer.callbacks = [*trainer.callbacks, Stopwatch()]  # last, so that all the others are in the time
        return run(trainer)

    Trainer.run = watched
    tokens = (warmup + steps) * torch.load(folder / "ids.pt").numel()
    words = [f"run.dir={folder / f'run_tp{tp}'}", f"train.tokens={tokens}", f"parallel.tp={tp}"]
    code = train(["--config", str(folder / "train.yaml"), *words, f"parallel.sp={str(tp > 1).lower()}"])
    if code:
        raise SystemExit(f"the trainer ended with exit code {int(code)}")
    if os.environ.get("RANK", "0") != "0":
        return {}  # the main process has the run's files, and takes them away
    report = _report(marks, warmup, *_first_and_last_loss(folder / f"run_tp{tp}"))
    shutil.rmtree(folder / f"run_tp{tp}")
    return report


def _first_and_last_loss(run: Path) -> tuple[float, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return losses[0], losses[-1]


def run_plain(folder: Path, tp: int, warmup: int, steps: int) -> dict:
    """A plain loop: the transformers model with SDPA, torch's AdamW (fused, its fastest on a CPU), gradients clipped."""
    import torch

    model, ids = _transformers_model(folder), torch.load(folder / "ids.pt")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": ADAM["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    betas = (ADAM["beta1"], ADAM["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=ADAM["lr"], betas=betas, eps=ADAM["eps"], fused=True)
    marks, losses, parts = [], [], ids.split(ROWS_AT_ONCE)
    for _ in range(warmup + steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in parts:
            loss = model(part, labels=part, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["clip_norm"])
        optimizer.step()
        losses.append(total)
        marks.append(time.perf_counter())
    return _report(marks, warmup, losses[0].item(), losses[-1].item())


def run_transformers(folder: Path, tp: int, warmup: int, steps: int) -> dict:
    """``transformers.Trainer`` with what it does besides training switched off; its losses are not asked for."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks: list[float] = []

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            marks.append(time.perf_counter())

    ids = torch.load(folder / "ids.pt")
    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        per_device_train_batch_size=ROWS_AT_ONCE,
        gradient_accumulation_steps=ROWS // ROWS_AT_ONCE,
        max_steps=warmup + steps,
        learning_rate=ADAM["lr"],
        lr_scheduler_type="constant",
        weight_decay=ADAM["weight_decay"],
        adam_beta1=ADAM["beta1"],
        adam_beta2=ADAM["beta2"],
        adam_epsilon=ADAM["eps"],
        max_grad_norm=ADAM["clip_norm"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(_transformers_model(folder), arguments, train_dataset=rows, callbacks=[Stopwatch()]).train()
    return _report(marks, warmup, None, None)


def _transformers_model(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    reader = AutoModelForCausalLM.from_pretrained
    return reader(folder / "hf", dtype=torch.float32, attn_implementation="sdpa").train()


def _report(marks: list[float], warmup: int, first: float | None, last: float | None) -> dict:
    """Marks are seconds at the end of each step, warm-up included."""
    times = [1000 * (end - start) for start, end in zip(marks, marks[1:], strict=False)]
    return {"step_ms": times[warmup - 1 :], "first_loss": first, "last_loss": last}


CONTENDERS = {"trainer": run_trainer, "plain": run_plain, "transformers": run_transformers}


if __name__ == "__main__":
    sys.exit(main())

"""The main job from nothing, on any machine: what ``bash launch/quickstart.sh [DIR]`` runs.

First it makes what a user already has: two corpora, a tokenizer and a base model in Hugging Face format, pretrained by the
trainer itself. Then it does what a user does, with the public tools only. Every step is a command that is printed; a step
that was done with the same command and the same code is not done again, and one that was cut off is done again or continued.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CORPUS_BYTES = {"domain": 3_000_000, "replay": 3_000_000}
HELDOUT_BYTES = 60_000
VOCABULARY = 2048
SEQ_LENGTH = 256
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "max_position_embeddings": 1024}

PRETRAIN = """\
# How the quickstart makes its base model: a random Llama trained on the replay text, by the same trainer.
run: {{dir: {dir}/pretrain}}
model: {{checkpoint: {dir}/work/random}}
precision: fp32
train: {{tokens: 600_000, seq_length: {seq}, global_batch_size: 8, micro_batch_size: 4}}
optimizer: {{lr: 3.0e-3, weight_decay: 0.01}}
schedule: {{kind: constant, warmup_tokens: 40_000}}
data:
  sources: [{{name: replay, path: {dir}/data/replay, role: replay}}]
eval:
  sets: [{{path: {dir}/data/general.heldout, bucket: general}}]
logging: {{interval_steps: 50}}
"""

TRAIN = """\
# Continued pretraining of the quickstart's base model on Python source code: copy this file and edit it.
# Every option: python -m cpt_mega.train --config THIS_FILE --print-config
run:
  dir: {dir}/run                        # status, metrics, checkpoints; the same command continues what it finds here
model:
  checkpoint: {dir}/import              # made by tools/import_hf.py from {dir}/base
precision: fp32                         # bf16 on GPUs
parallel:
  tp: 2                                 # two processes share each layer
  sp: true                              # and the activations between layers
train:
  tokens: 200_000                       # budget of this run
  seq_length: {seq}                       # tokens of a packed row; documents never see each other
  global_batch_size: 8                  # rows a step
  micro_batch_size: 8                   # rows a forward pass
optimizer:
  lr: 5.0e-4                            # for a tiny young model; 2e-5 is the place to start with a real one
  weight_decay: 0.01
schedule:
  kind: cosine                          # re-warm, then decay to 10 % of the peak
  warmup_tokens: 15_000
data:
  sources:
    - {{name: domain, path: {dir}/data/domain, role: domain, weight: 0.8}}
    - {{name: replay, path: {dir}/data/replay, role: replay, weight: 0.2}}   # keeps old skills alive
eval:
  interval_tokens: 100_000
  max_tokens: 8_192                     # of each set, at each look
  sets:
    - {{path: {dir}/data/domain.heldout, bucket: domain}}
    - {{path: {dir}/data/general.heldout, bucket: general}}
gates:
  general_perplexity_limit: 0.15        # stop when general perplexity is 15 % above its step-0 value
checkpoint:
  interval_tokens: 100_000
logging:
  interval_steps: 20
  wandb: offline                        # needs no account
"""


@dataclass(frozen=True)
class Step:
    """One step: a title, the command that does it (from the checkout), and what it leaves in DIR."""

    name: str
    title: str
    command: list[str]
    outputs: tuple[str, ...]
    continues: bool = False  # cut off, it goes on where it was; others start again
    ends: tuple[int, ...] = (0,)  # exit codes that are an end of it
    log: str | None = None  # in DIR: its output goes there, in place of the terminal


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bash launch/quickstart.sh", description="The whole main job on this machine."
    )
    parser.add_argument("dir", nargs="?", default=str(ROOT / "runs" / "quickstart"), help="where everything is left")
    parser.add_argument("--only", choices=["texts", "model", "compare"], help=argparse.SUPPRESS)  # the steps call back
    options = parser.parse_args()
    folder = Path(options.dir).expanduser().absolute()
    if options.only:
        {"texts": make_texts, "model": make_model, "compare": compare}[options.only](folder)
        return 0
    try:
        return Quickstart(folder).run()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is broken; the same command goes on from here", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"\nerror: this step ended with exit code {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return error.returncode


class Quickstart:
    """Runs the steps in order, each once."""

    def __init__(self, folder: Path):
        self.folder, self.console = folder, Console(highlight=False)
        self.stamps = folder / "work" / "steps"

    def run(self) -> int:
        self.console.print(Panel(_WELCOME.format(dir=self.folder), title="cpt_mega quickstart", border_style="cyan"))
        _, seconds = self.make(plan(self.folder))
        return self._finish(seconds)

    def make(self, steps: list[Step]) -> tuple[str, float]:
        """Does steps, each on what those before it left; returns a key of all that was made, and the seconds it took."""
        self.stamps.mkdir(parents=True, exist_ok=True)
        for name, text in (("pretrain.yaml", PRETRAIN), ("train.yaml", TRAIN)):
            (self.folder / name).write_text(text.format(dir=self.folder, seq=SEQ_LENGTH))
        key, seconds = _code_digest(), 0.0
        for number, step in enumerate(steps, 1):
            key = digest(key, *step.command)
            seconds += self.do(step, key, f"{number}/{len(steps)}")
        return key, seconds

    def do(self, step: Step, key: str, place: str) -> float:
        """Does a step unless it was done under this key; returns the seconds it took when it was.

        Raises CalledProcessError for an exit code that is no end of it.
        """
        stamp = self.stamps / f"{step.name}.json"
        done = _read_json(stamp)
        if done.get("key") == key and "seconds" in done and all((self.folder / o).exists() for o in step.outputs):
            self.console.print(f"[green]done[/]  {place} {step.title} [dim]({done['seconds']:.0f} s, earlier)[/]")
            return done["seconds"]
        self.console.print(Rule(f"[bold]{place} {step.title}", align="left", style="cyan"))
        self.console.print(f"[dim]$ {shlex.join(step.command)}[/]", soft_wrap=True)
        if not (step.continues and done.get("key") == key):
            for output in step.outputs:
                _remove(self.folder / output)
        stamp.write_text(json.dumps({"key": key}))
        begin = time.monotonic()
        _call(step, self.folder)
        seconds = time.monotonic() - begin
        stamp.write_text(json.dumps({"key": key, "seconds": seconds}))
        return seconds

    def _finish(self, seconds: float) -> int:
        found = _read_json(self.folder / "work" / "comparison.json")
        metrics = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        perplexity = {bucket: _first_and_last(metrics, bucket) for bucket in ("domain", "general")}
        rates = sorted(line["tokens_per_s_device"] for line in metrics if line["kind"] == "train")
        summary = {
            "perplexity": perplexity,
            "tokens_per_s": 2 * rates[len(rates) // 2],
            "max_logprob_difference": found["max_logprob_difference"],
            "seconds": round(seconds, 1),
            "paths": {name: str(self.folder / name) for name in ("base", "export", "run", "train.yaml", "data")},
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        checks = _checks(summary, found)
        self.console.print(_closing_table(summary, found, checks))
        self.console.print(_samples_table(found))
        train = _shown(self.folder / "train.yaml")
        self.console.print(f"everything is in {self.folder}", soft_wrap=True)
        self.console.print(f"next: make it yours\n  cp {train} configs/mine.yaml      # and edit it", soft_wrap=True)
        self.console.print("  bash launch/torchrun.sh configs/mine.yaml run.dir=runs/mine", soft_wrap=True)
        return 0 if all(passed for _, _, _, passed in checks) else 1


_WELCOME = """\
A Hugging Face checkpoint in, continued pretraining on megatron-core, a better Hugging Face checkpoint out.
The domain is Python source code, the general text is documentation prose; both come from this machine.
Everything is left in {dir}. Ctrl-C is safe; the same command continues."""


def plan(folder: Path) -> list[Step]:
    """The steps. Up to the base model they make what a user already has; from there on they are what a user types."""
    kinds = _Steps(folder)
    return [*_steps_to_base(kinds), *_steps_from_base(kinds)]


class _Steps:
    """Steps of the kinds that come several times, in DIR."""

    def __init__(self, folder: Path):
        self.d = str(folder)

    def corpus(self, name: str) -> Step:
        """Text to tokens."""
        words = ["--input", f"{self.d}/data/{name}.jsonl", "--tokenizer", f"{self.d}/work/hf_random"]
        words += ["--output", f"{self.d}/data/{name}", "--workers", "2"]
        outputs = tuple(f"data/{name}.{end}" for end in ("bin", "idx", "manifest.json"))
        return Step(f"preprocess-{name}", f"Tokenise {name}", [*_tool("preprocess_data"), *words], outputs)

    def convert(self, name: str, title: str, direction: str, source: str, target: str) -> Step:
        """A checkpoint in (``import_hf``) or out (``export_hf``)."""
        option = "--hf" if direction == "import_hf" else "--checkpoint"
        words = [option, f"{self.d}/{source}", "--output", f"{self.d}/{target}"]
        return Step(name, title, [*_tool(direction), *words], (target,))

    def train(self, name: str, title: str, output: str, *environment: str) -> Step:
        """A run of ``NAME.yaml``."""
        words = [*environment, "bash", str(ROOT / "launch" / "torchrun.sh"), f"{self.d}/{name}.yaml"]
        return Step(name, title, words, (output,), True)

    def own(self, name: str, title: str, output: str) -> Step:
        """Done by this script itself."""
        return Step(name, title, [*_tool("quickstart"), self.d, "--only", name], (output,))


def _tool(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py")]


def _steps_to_base(kinds: _Steps) -> list[Step]:
    return [
        kinds.own("texts", "Gather two corpora from this machine", "data"),
        kinds.own("model", "Train a tokenizer, make a random small Llama", "work/hf_random"),
        *map(kinds.corpus, ("replay", "general.heldout")),
        kinds.convert("import-random", "Import the random model", "import_hf", "work/hf_random", "work/random"),
        kinds.train("pretrain", "Pretrain it on general text: the base model", "pretrain", "env", "NPROC=2"),
        kinds.convert("export-base", "Export the base model", "export_hf", "pretrain", "base"),
    ]


def _steps_from_base(kinds: _Steps) -> list[Step]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = ["--checkpoint", f"{kinds.d}/run", "--input", f"{kinds.d}/data/rows.jsonl"]
    files += ["--output", f"{kinds.d}/work/scores.jsonl"]
    score = [*launch, "-m", "cpt_mega.score", *files, "parallel.tp=2", "parallel.sp=true"]
    return [
        *map(kinds.corpus, ("domain", "domain.heldout")),
        kinds.convert("import-base", "Import the base model", "import_hf", "base", "import"),
        kinds.train("train", "Continue pretraining on code (TP 2, sequence parallel, 20 % replay)", "run"),
        kinds.convert("export", "Export the result", "export_hf", "run", "export"),
        Step("score", "Score held-out rows with the trainer's own forward pass", score, ("work/scores.jsonl",)),
        kinds.own("compare", "Compare with transformers", "work/comparison.json"),
    ]


def make_texts(folder: Path) -> None:
    """``data/{domain,replay}.jsonl`` and ``data/{domain,general}.heldout.jsonl``; the former repeat nothing of the latter."""
    from machine_text import docstring_prose, python_sources, take_bytes, without_runs_of

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, held, documents in (("domain", "domain", python_sources()), ("replay", "general", docstring_prose())):
        texts = take_bytes(documents, CORPUS_BYTES[name] + HELDOUT_BYTES)
        count, size = 0, 0
        while size < HELDOUT_BYTES:
            size += len(texts[count].encode())
            count += 1
        rest = without_runs_of(texts[count:], texts[:count])
        for path, part in ((data / f"{held}.heldout.jsonl", texts[:count]), (data / f"{name}.jsonl", rest)):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
            print(f"  {path.name:24} {len(part):6,} documents {sum(map(len, part)):12,} characters")


def make_model(folder: Path) -> None:
    """``work/hf_random``: a byte-level BPE tokenizer trained on both corpora and a random Llama, as a user would have them."""
    from machine_model import byte_level_tokenizer, save_random_llama

    lines = (folder / "data" / name for name in ("domain.jsonl", "replay.jsonl"))
    texts = [json.loads(line)["text"] for path in lines for line in path.read_text().splitlines()]
    tokenizer = byte_level_tokenizer(texts, VOCABULARY, ["<|endoftext|>"])
    parameters = save_random_llama(folder / "work" / "hf_random", tokenizer, seed=20, **SIZES)
    _write_rows(folder, tokenizer)
    counts = Counter(token for text in texts[-2000:] for token in tokenizer.encode(text).ids)
    (folder / "work" / "unigram.json").write_text(json.dumps(_entropy(counts)))
    print(f"  tokenizer of {VOCABULARY} tokens; Llama of {parameters:,} parameters")


def _write_rows(folder: Path, tokenizer) -> None:
    """``data/rows.jsonl``: rows of two held-out documents each, for the scorer."""
    texts = {}
    for name in ("domain", "general"):
        lines = (folder / "data" / f"{name}.heldout.jsonl").read_text().splitlines()[:6]
        texts[name] = [tokenizer.encode(json.loads(line)["text"]).ids[: SEQ_LENGTH // 2] for line in lines]
    rows = [
        {"id": i, "ids": a + b, "doc_lengths": [len(a), len(b)]}
        for i, (a, b) in enumerate(zip(texts["domain"], texts["general"], strict=False))
    ]
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(folder: Path) -> None:
    """Log-probabilities of the trainer against transformers on the export, and a sample of both models' writing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (folder / "data" / "rows.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (folder / "work" / "scores.jsonl").read_text().splitlines()]
    worst, tokens = 0.0, 0
    for row, score in zip(rows, scores, strict=True):
        start = 0
        for length in row["doc_lengths"]:  # each document alone: what packing must not change
            ids = torch.tensor([row["ids"][start : start + length]])
            with torch.no_grad():
                reference = model(ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            ours = torch.tensor(score["logprobs"][start + 1 : start + length])
            worst = max(worst, (reference - ours).abs().max().item())
            tokens += length - 1
            start += length
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    samples = {}
    for name in ("base", "export"):
        writer = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        prompt = tokenizer("import os\n\n\ndef ", return_tensors="pt")
        output = writer.generate(**prompt, max_new_tokens=48, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
        samples[name] = tokenizer.decode(output[0])
    unigram = json.loads((folder / "work" / "unigram.json").read_text())
    pretrain = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    result = {
        "max_logprob_difference": worst,
        "compared_tokens": tokens,
        "samples": samples,
        "unigram_entropy": unigram,
        "base_loss": math.log(_first_and_last(pretrain, "general")[1]),
    }
    (folder / "work" / "comparison.json").write_text(json.dumps(result, indent=1))
    print(f"  {tokens:,} log-probabilities compared; largest difference {worst:.1e}")


def _entropy(counts: Counter) -> float:
    """Entropy of a unigram model, nats a token."""
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def _first_and_last(metrics: list[dict], bucket: str) -> list[float]:
    values = [line["value"] for line in metrics if line["kind"] == "eval" and line["bucket"] == bucket]
    return [values[0], values[-1]]


def _checks(summary: dict, found: dict) -> list[tuple[str, str, str, bool]]:
    """(what, measured, required, passed): what the quickstart promises, judged on what it measured."""
    domain = summary["perplexity"]["domain"][1] / summary["perplexity"]["domain"][0] - 1
    general = summary["perplexity"]["general"][1] / summary["perplexity"]["general"][0] - 1
    difference = summary["max_logprob_difference"]
    base, unigram = found["base_loss"], found["unigram_entropy"]
    return [
        (
            "sanity: base model's loss, unigram entropy",
            f"{base:.2f} / {unigram:.2f} nats",
            "below 0.9 of the entropy",
            base < 0.9 * unigram,
        ),
        ("domain perplexity", _change(summary["perplexity"]["domain"], domain), "-20 % or better", domain <= -0.2),
        ("general perplexity", _change(summary["perplexity"]["general"], general), "+5 % at most", general <= 0.05),
        ("export against trainer, log-probabilities", f"{difference:.1e}", "1e-4 at most", difference <= 1e-4),
    ]


def _change(values: list[float], change: float) -> str:
    return f"{values[0]:.1f} -> {values[1]:.1f}  ({change:+.1%})"


def _closing_table(summary: dict, found: dict, checks: list[tuple[str, str, str, bool]]) -> Table:
    table = Table(title="what came out", title_justify="left", border_style="cyan")
    for name in ("", "measured", "promised", ""):
        table.add_column(name)
    for what, measured, required, passed in checks:
        table.add_row(what, measured, required, "[green]yes[/]" if passed else "[bold red]NO[/]")
    table.add_row("training speed", f"{summary['tokens_per_s']:,.0f} tokens/s", "", "")
    table.add_row(
        "all steps together",
        f"{summary['seconds']:.0f} s",
        "480 s",
        "[green]yes[/]" if summary["seconds"] < 480 else "[yellow]slow[/]",
    )
    return table


def _samples_table(found: dict) -> Table:
    table = Table(title="the same prompt before and after", title_justify="left", border_style="cyan", show_lines=True)
    for name in found["samples"]:
        table.add_column(name)
    table.add_row(*(text.replace("[", "\\[") for text in found["samples"].values()))
    return table


def _call(step: Step, folder: Path) -> None:
    """Runs a step to its end; Ctrl-C waits for it, because it reaches the command as well and a trainer saves first."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    with open(folder / step.log, "a") if step.log else contextlib.nullcontext() as log:
        child = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
    if code not in step.ends:
        raise subprocess.CalledProcessError(code, step.command)


def _code_digest() -> str:
    files = sorted(
        path
        for part in ("cpt_mega", "tools", "launch")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".sh", ".txt")
    )
    return digest(*(part for path in files for part in (str(path.relative_to(ROOT)), path.read_text())))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shown(path: Path) -> str:
    return shlex.quote(str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path))


if __name__ == "__main__":
    sys.exit(main())

"""Where the campaign of faults works: texts of this machine, a tiny model, corpora, an import and a configuration."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.machine_model import byte_level_tokenizer, save_random_llama
from tools.machine_text import docstring_prose, python_sources

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """\
run: {{dir: {folder}/reference}}
model: {{checkpoint: {folder}/import}}
precision: fp32
parallel: {{tp: 2, sp: true}}
train: {{tokens: {tokens}, seq_length: 32, global_batch_size: 8, micro_batch_size: 4}}
optimizer: {{lr: 1.0e-2, weight_decay: 0.1}}
schedule: {{kind: cosine, warmup_tokens: 300}}
data:
  sources:
    - {{name: domain, path: {folder}/domain, role: domain}}
    - {{name: replay, path: {folder}/replay, role: replay}}
eval:
  interval_tokens: 1_500
  max_tokens: 2_000
  sets: [{{path: {folder}/heldout, bucket: general}}]
gates: {{general_perplexity_limit: null, max_overlap: null}}  # docstrings repeat each other, and nothing is judged
checkpoint: {{interval_tokens: 2_500}}
logging: {{interval_steps: 1, tensorboard: false}}
"""
VOCABULARY = 512
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
PROSE = {"heldout": 100, "replay": 400}  # documents


@dataclass(frozen=True)
class Site:
    """Where everything lies, and how much it is.

    Attributes:
        folder: may not be there yet.
        tokens: of a run; a step has about 250.
        documents: of the corpus that is trained on; by default so many that its plan is kept on disk.
    """

    folder: Path
    tokens: int = 8_000
    documents: int = 140_000

    @property
    def config(self) -> Path:
        return self.folder / "train.yaml"

    @property
    def reference(self) -> Path:
        """The run that nothing happens to."""
        return self.folder / "reference"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def tool(self, name: str, *words: str) -> list[str]:
        return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]

    def preprocess(self, name: str, output: Path) -> list[str]:
        words = ["--input", f"{self.folder}/{name}.jsonl", "--tokenizer", f"{self.folder}/hf", "--output", str(output)]
        return self.tool("preprocess_data", *words, "--workers", "2")


def prepare(site: Site) -> None:
    """Texts, a tokenizer and a model as a user has them, the corpora, the import, the configuration.

    All in this process, where the tools would each take seconds to start. Raises InputError where one stands there already.
    """
    from cpt_mega.data.preprocess import PreprocessOptions, preprocess
    from cpt_mega.hf.convert import import_hf

    site.folder.mkdir(parents=True, exist_ok=True)
    prose, lines = docstring_prose(), lines_of(python_sources())
    texts = {name: list(itertools.islice(prose, count)) for name, count in PROSE.items()}
    texts["domain"] = list(itertools.islice(lines, site.documents))
    hf = site.folder / "hf"
    tokenizer = byte_level_tokenizer(texts["replay"], VOCABULARY, ["<|end|>"])
    save_random_llama(hf, tokenizer, seed=1, **SIZES)
    for name, documents in texts.items():
        source = site.folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        # one worker is this process itself: torch has threads in it by now, and must not be forked
        preprocess(PreprocessOptions((str(source),), str(hf), str(site.folder / name), workers=1))
    import_hf(hf, site.folder / "import")
    site.config.write_text(TRAIN.format(folder=site.folder, tokens=site.tokens))


def lines_of(texts: Iterator[str]) -> Iterator[str]:
    """Lines that say something, again and again if there are too few of them."""
    lines = [line for text in itertools.islice(texts, 500) for line in text.splitlines() if len(line) > 20]
    return itertools.cycle(lines)


def call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")

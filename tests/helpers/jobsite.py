"""A small model, corpora and a configuration, as a user would have them: where the trainer's tests work."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt_mega.data.indexed_writer import IndexedCorpusWriter
from cpt_mega.hf.convert import import_hf
from tests.helpers.models import tiny_llama

SEQ_LENGTH = 32
EOS = 0

CONFIG = """\
run: {{dir: {folder}/run}}
model: {{checkpoint: {folder}/import}}
precision: fp32
train: {{tokens: 1000, seq_length: 32, global_batch_size: 8, micro_batch_size: 2}}
optimizer: {{lr: 1.0e-2, weight_decay: 0.1}}
schedule: {{kind: cosine, warmup_tokens: 300}}
data:
  sources:
    - {{name: domain, path: {folder}/domain, role: domain}}
    - {{name: replay, path: {folder}/replay, role: replay}}
eval:
  max_tokens: 320
  sets:
    - {{path: {folder}/domain.heldout, bucket: domain}}
    - {{path: {folder}/general.heldout, bucket: general}}
gates: {{general_perplexity_limit: null}}
logging: {{interval_steps: 1, tensorboard: false}}
"""


@dataclass(frozen=True)
class Jobsite:
    """Paths of what ``make_jobsite`` made."""

    folder: Path
    vocab_size: int

    @property
    def config(self) -> str:
        return str(self.folder / "train.yaml")

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "import")


def make_jobsite(folder: Path) -> Jobsite:
    """A Llama of a few thousand parameters, imported, four corpora without manifests, and ``train.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    site = Jobsite(folder, 301)
    tiny_llama(site.hf, num_hidden_layers=4, vocab_size=site.vocab_size, initializer_range=0.02)
    import_hf(site.hf, site.checkpoint)
    for seed, name in enumerate(("domain", "replay", "domain.heldout", "general.heldout")):
        write_documents(folder / name, random_documents(seed, 60, site.vocab_size, upper="domain" in name))
    (folder / "train.yaml").write_text(CONFIG.format(folder=folder))
    return site


def random_documents(seed: int, count: int, vocab_size: int, upper: bool = False) -> list[list[int]]:
    """Documents of 2 to 50 tokens from half of the vocabulary, each ending with EOS."""
    draw = np.random.default_rng(seed)
    low, high = (vocab_size // 2, vocab_size) if upper else (1, vocab_size // 2)
    return [[*draw.integers(low, high, draw.integers(1, 50)).tolist(), EOS] for _ in range(count)]


def write_documents(prefix: Path, documents: list[list[int]]) -> None:
    """A corpus as Megatron-LM would have written it, without a manifest."""
    with IndexedCorpusWriter(str(prefix), np.uint16) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.uint16))


def metrics(run: str | Path, kind: str | None = None) -> list[dict]:
    """Lines of ``metrics.jsonl``, of one kind or all."""
    lines = (json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["kind"])]


def status(run: str | Path) -> dict:
    """``status.json``."""
    return json.loads((Path(run) / "status.json").read_text())


def checkpoint_tensors(folder: str | Path) -> dict:
    """Every tensor of a checkpoint by name, whole, whatever layout wrote it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def assert_same_end(run: Path, other: Path) -> None:
    """The same losses and the same last checkpoint, moments and all."""
    import torch

    losses = [{line["step"]: line["loss"] for line in metrics(folder, "train")} for folder in (run, other)]
    assert losses[0] == losses[1]
    newest = [sorted((folder / "checkpoints").glob("iter_*"))[-1] for folder in (run, other)]
    tensors = [checkpoint_tensors(folder) for folder in newest]
    assert newest[0].name == newest[1].name and tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())

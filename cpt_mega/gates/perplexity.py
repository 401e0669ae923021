"""Perplexity of fixed held-out items, per bucket, through the very forward pass that training uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_mega.config.schema import Config
from cpt_mega.data.heldout import heldout_rows
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.packing import RowPlan
from cpt_mega.data.rows import build_row
from cpt_mega.data.sources import open_corpus
from cpt_mega.engine.step import Engine


@dataclass(frozen=True)
class HeldOut:
    """One evaluation set: rows of a corpus that never change during a run."""

    name: str
    bucket: str
    corpus: IndexedCorpus
    plan: RowPlan


@dataclass(frozen=True)
class Reading:
    """One measured value. ``nll`` is the summed negative log-likelihood in nats over ``n`` target tokens."""

    bucket: str
    probe: str
    nll: float
    n: int

    @property
    def value(self) -> float:
        """Perplexity: exp of the mean negative log-likelihood a token; inf when it overflows."""
        return _perplexity(self.nll, self.n)

    def to_json(self) -> dict:
        return {"bucket": self.bucket, "probe": self.probe, "metric": "perplexity", "value": self.value, "n": self.n}


def open_eval_sets(config: Config, tokenizer_digest: str, vocab_size: int) -> list[HeldOut]:
    """Opens the sets of ``eval.sets``. Raises InputError when one is unusable or was made by another tokenizer."""
    sets = []
    for option in config.eval.sets:
        corpus = open_corpus(f"eval.sets {option.bucket}", option.path, tokenizer_digest, vocab_size)
        plan = heldout_rows(corpus, config.train.seq_length, config.eval.max_tokens)
        sets.append(HeldOut(Path(option.path).name, option.bucket, corpus, plan))
    return sets


def measure(engine: Engine, sets: Sequence[HeldOut]) -> list[Reading]:
    """Perplexity of each set. Changes no weight, generator or data state. A collective; equal on all ranks."""
    return [_measure_one(engine, held) for held in sets]


def by_bucket(readings: Sequence[Reading]) -> dict[str, float]:
    """Perplexity per bucket, over all target tokens of its sets."""
    sums: dict[str, tuple[float, int]] = {}
    for reading in readings:
        nll, n = sums.get(reading.bucket, (0.0, 0))
        sums[reading.bucket] = (nll + reading.nll, n + reading.n)
    return {bucket: _perplexity(nll, n) for bucket, (nll, n) in sums.items()}


def _measure_one(engine: Engine, held: HeldOut) -> Reading:
    length, vocab = engine.config.train.seq_length, engine.shape.vocab_size

    def read(row: int):
        return build_row(held.corpus, held.plan, row, length, vocab_size=vocab)

    nll, targets = engine.evaluate(held.plan.rows, read).sum(dim=0).tolist()
    return Reading(held.bucket, held.name, nll, int(targets))


def _perplexity(nll: float, n: int) -> float:
    mean = nll / max(n, 1)
    return math.exp(mean) if mean < 700 else math.inf

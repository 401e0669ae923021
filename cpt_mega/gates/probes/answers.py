"""Bits per byte of the gold answers to open questions: far less noisy than right and wrong (arXiv 2508.13144)."""

import math
from collections.abc import Sequence
from statistics import fmean

from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import AnswerItem
from cpt_mega.gates.probes.probe import BITS_PER_BYTE, Content, ItemScore, Reading
from cpt_mega.gates.requests import Likelihood


class Answers:
    """Questions with one answer each; ``shown`` are put before each, with their answers, and not scored."""

    scale = BITS_PER_BYTE

    def __init__(
        self,
        name: str,
        bucket: str,
        items: Sequence[AnswerItem],
        encoder: Encoder,
        shown: Sequence[AnswerItem] = (),
    ):
        self.name, self.bucket = name, bucket
        self._items, self._encoder = list(items), encoder
        self.ids = [item.id for item in self._items]
        before = "".join(f"{_prompt(item)} {item.answer}\n\n" for item in shown)
        self._pairs = [(before + _prompt(item), f" {item.answer}") for item in self._items]
        self.requests = encoder.continued(self._pairs)

    def contents(self) -> list[Content]:
        """See Probe: the question and its answer."""
        forms = self._encoder.forms([f"{item.question.strip()} {item.answer.strip()}" for item in self._items])
        return [Content(item.id, own) for item, own in zip(self._items, forms, strict=True)]

    def identity(self) -> object:
        """See Probe."""
        return ["answers", self.name, self.bucket, [item.id for item in self._items], self._pairs]

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """See Probe."""
        return [self._score(*each) for each in zip(self._items, self._pairs, answers, strict=True)]

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe."""
        metrics = ("bits_per_byte", "exact")
        return [Reading(metric, fmean(item.values[metric] for item in items), len(items)) for metric in metrics]

    def _score(self, item: AnswerItem, pair: tuple[str, str], answer: Likelihood) -> ItemScore:
        bits = -answer.logprob / math.log(2) / len(pair[1].encode())
        return ItemScore(item.id, -bits, {"bits_per_byte": bits, "exact": float(answer.is_greedy)})


def _prompt(item: AnswerItem) -> str:
    return f"Question: {item.question}\nAnswer:"

"""How far a model has moved from the one that the run began with: KL(base || now) on fixed texts.

It predicts forgetting where distances of weights do not (arXiv 2509.04259). The base's distributions are kept as their
``count`` likeliest tokens; what is cut off can only be bounded. With p the base's probabilities, q today's, and r the rest
that is not kept: taking the rest for one token gives a divergence that is no larger than the true one (data processing). And
since no token of the rest is likelier than the last one kept, nor less likely today than the least likely of all,

    KL <= sum over kept of p log(p / q) + p_r (log p_last - log q_least).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from cpt_mega.gates.probes.probe import OTHER, ItemScore, Reading
from cpt_mega.gates.requests import Likeliest, Request

_TINY = 1e-12  # a rest is not taken for smaller


@dataclass(frozen=True)
class Divergence:
    """Of each target: bounds of KL(base || now) in nats, and the base's probability that was cut off; float64 [targets]."""

    low: np.ndarray
    high: np.ndarray
    rest: np.ndarray


class Drift:
    """Texts, one item each; every token but the first is a target."""

    scale = OTHER

    def __init__(self, name: str, bucket: str, texts: Sequence[tuple[str, np.ndarray]], count: int):
        """``texts``: ids of items, and their tokens int64 [n > 1]; ``count``: of the likeliest tokens that are kept."""
        self.name, self.bucket, self.count = name, bucket, count
        self.ids = [item for item, _ in texts]
        self.requests: list[Request] = []  # of the likelihood of nothing
        self.texts = [Request(tokens, 1) for _, tokens in texts]

    def contents(self) -> None:
        """See Probe: the model is compared with itself, and nothing is known by heart for it."""

    def identity(self) -> object:
        """See Probe."""
        texts = [[item, text.tokens.tolist()] for item, text in zip(self.ids, self.texts, strict=True)]
        return ["drift", self.name, self.bucket, self.count, texts]

    def items(self, found: Divergence) -> list[ItemScore]:
        """Scores from the divergences at the targets of ``texts``, in the order of the items."""
        scores, at = [], 0
        for item, text in zip(self.ids, self.texts, strict=True):
            part = slice(at, at + text.inputs)
            low, high, rest = (float(values[part].mean()) for values in (found.low, found.high, found.rest))
            scores.append(ItemScore(item, -low, {"kl": low, "kl_at_most": high, "cut_off": rest}))
            at += text.inputs
        return scores

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe."""
        metrics = ("kl", "kl_at_most", "cut_off")
        return [Reading(metric, fmean(item.values[metric] for item in items), len(items)) for metric in metrics]


def divergence(base: Likeliest, logprobs: np.ndarray, least: np.ndarray) -> Divergence:
    """Bounds of KL(base || now) at each target.

    Args:
        base: what was kept of the base.
        logprobs: today's, of the tokens that were kept, float64 [targets, count].
        least: today's, of the least likely token of all, float64 [targets].
    """
    p = np.exp(base.logprobs)
    rest = np.maximum(1 - p.sum(axis=1), 0.0)
    rest_now = np.maximum(1 - np.exp(logprobs).sum(axis=1), _TINY)
    kept = (p * (base.logprobs - logprobs)).sum(axis=1)
    low = kept + np.where(rest > _TINY, rest * np.log(np.maximum(rest, _TINY) / rest_now), 0.0)
    high = kept + rest * (base.logprobs[:, -1] - least)
    return Divergence(np.maximum(low, 0.0), np.maximum(high, low), rest)

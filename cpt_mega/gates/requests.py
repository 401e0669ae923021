"""Texts whose end is scored, and the answers: what every likelihood probe asks of the model."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """Tokens, of which the last ones are scored.

    Attributes:
        tokens: int64 [n], n > 1.
        first: index of the first token that is scored, at least 1; all behind it are too.
        lengths: tokens of each document, if they are several; they sum to n. The scored tokens are in the last one.
        counts: bool [n], which of those from ``first`` on are scored; None: all.
    """

    tokens: np.ndarray
    first: int
    lengths: tuple[int, ...] = ()
    counts: np.ndarray | None = None

    @property
    def inputs(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Likelihood:
    """The answer to a request.

    Attributes:
        logprob: of all scored tokens given what is before them, nats.
        is_greedy: whether each of them is the likeliest one.
        targets: how many they are.
    """

    logprob: float
    is_greedy: bool
    targets: int


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens at each target of some requests, the targets of all one behind the other.

    Attributes:
        ids: int64 [targets, count], likeliest first.
        logprobs: float64 [targets, count], nats.
    """

    ids: np.ndarray
    logprobs: np.ndarray

"""What gates have changed of a run: the learning rate after their rollbacks, and an early end with a rate that goes to zero."""

import math
from dataclasses import dataclass

from cpt_mega.errors import CheckpointError
from cpt_mega.json_types import Count, type_problem


@dataclass(frozen=True)
class Steering:
    """A part of every checkpoint; a pure function of the verdicts before it.

    Attributes:
        rollbacks: made by gates so far.
        lr_scale: what the schedule's learning rate is multiplied by for the rest of the run.
        anneal_from, anneal_tokens: from where on, and in how many tokens, the rate falls to zero and the run ends; None for
            a run that nothing has annealed.
    """

    rollbacks: Count = 0
    lr_scale: float = 1.0
    anneal_from: Count | None = None
    anneal_tokens: Count | None = None

    def to_json(self) -> dict:
        """Plain values; ``from_json`` gives an equal one back."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: dict) -> "Steering":
        """Raises CheckpointError for values that ``to_json`` did not make; an empty one is a new run's."""
        problem = type_problem(values, cls)
        if problem is None and (values.get("anneal_from") is None) != (values.get("anneal_tokens") is None):
            problem = "anneal_from and anneal_tokens belong together"
        if problem is not None:
            raise CheckpointError("steering", values, f"cannot be read ({problem}); use an older checkpoint")
        return cls(**values)

    @property
    def ends_at(self) -> float:
        """Tokens at which an annealed run ends; infinite for one that is not."""
        return math.inf if self.anneal_from is None else self.anneal_from + self.anneal_tokens

    def rate(self, tokens: int) -> float:
        """What the schedule's rate is multiplied by in a step that ends at so many tokens of the run."""
        if self.anneal_from is None:
            return self.lr_scale
        return self.lr_scale * min(1.0, max(0.0, (self.ends_at - tokens) / self.anneal_tokens))

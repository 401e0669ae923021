"""The learning rate as a pure function of tokens: no state, so a resumed or extended run cannot drift.

Re-warm and re-decay follow Ibrahim et al. 2024 (arXiv 2403.08763); WSD is warm-up, stable, decay (MiniCPM,
arXiv 2404.06395).
"""

import math
from dataclasses import dataclass

from cpt_mega.config.schema import Config


@dataclass(frozen=True)
class LearningRate:
    """Learning rate after ``tokens`` tokens. Rates are Adam's step size; lengths are in tokens."""

    kind: str
    peak: float
    floor: float
    warmup_tokens: int
    decay_tokens: int
    total_tokens: int

    @classmethod
    def from_config(cls, config: Config) -> "LearningRate":
        """The schedule of a run over ``train.tokens``; warm-up is 1 % and decay 10 % of them where nothing is said."""
        total, schedule = config.train.tokens, config.schedule
        warmup = schedule.warmup_tokens
        return cls(
            kind=schedule.kind,
            peak=config.optimizer.lr,
            floor=config.min_lr,
            warmup_tokens=round(0.01 * total) if warmup is None else warmup,
            decay_tokens=schedule.decay_tokens or max(1, round(0.1 * total)),
            total_tokens=total,
        )

    @property
    def decay_start(self) -> int | None:
        """Tokens at which wsd's decay begins; None for schedules without a phase of decay."""
        return max(self.warmup_tokens, self.total_tokens - self.decay_tokens) if self.kind == "wsd" else None

    def at(self, tokens: int, peak: float | None = None, floor: float | None = None) -> float:
        """Rate for a step that ends at ``tokens`` (>= 0); the first step of a run is not wasted at rate zero.

        ``peak`` and ``floor`` are for parameters that have their own.
        """
        peak, floor = (self.peak if peak is None else peak), (self.floor if floor is None else floor)
        if tokens < self.warmup_tokens:
            return peak * tokens / self.warmup_tokens
        if self.kind == "constant":
            return peak
        start = self.warmup_tokens if self.kind == "cosine" else self.decay_start
        span = self.total_tokens - start
        done = min(1.0, max(0.0, (tokens - start) / span)) if span > 0 else float(tokens >= self.total_tokens)
        if self.kind == "cosine":
            return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * done))
        return peak + (floor - peak) * done

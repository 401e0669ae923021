"""Rules: a baseline and new readings in, a verdict out. Pure, so that a recorded decision can be derived again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Verdict:
    """What a rule says. ``action`` is ``continue`` or ``stop``; the numbers it was taken on go into the ledger."""

    rule: str
    action: str
    reason: str
    numbers: dict

    def to_json(self) -> dict:
        return asdict(self)


def general_perplexity(baseline: Mapping[str, float], now: Mapping[str, float], limit: float) -> Verdict | None:
    """Stops when general perplexity is above its step-0 value by more than ``limit`` (a share; 0.15 is 15 %).

    A perplexity that is not a number stops as well. Returns None when the run measures no general bucket.
    """
    if "general" not in baseline or "general" not in now:
        return None
    before, after = baseline["general"], now["general"]
    rise = after / before - 1.0
    within = math.isfinite(rise) and rise <= limit
    reason = (
        f"general perplexity {after:.4g} is {rise:+.1%} of its step-0 value {before:.4g}; the limit is +{limit:.0%}"
    )
    numbers = {"baseline": before, "value": after, "rise": rise, "limit": limit}
    return Verdict("general_perplexity_limit", "continue" if within else "stop", reason, numbers)

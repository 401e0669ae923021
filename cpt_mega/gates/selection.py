"""Which checkpoints of a run are good, from what the gates found at each look."""

import math
from collections.abc import Collection, Sequence


def healthy_steps(history: Sequence[dict]) -> list[int]:
    """Steps at which the gates looked and did not object, oldest first."""
    return [look["step"] for look in history if look["action"] == "continue"]


def best_step(history: Sequence[dict], among: Collection[int]) -> int | None:
    """The step with the lowest domain perplexity (general, where no domain is measured) that no gate objected to.

    Args:
        history: looks, ``{"step", "perplexity": {bucket: value}, "action"}``.
        among: steps that can be chosen.

    Returns None where there is none.
    """
    looks = [look for look in history if look["step"] in among and look["action"] != "stop"]
    for bucket in ("domain", "general"):
        values = {look["step"]: look["perplexity"][bucket] for look in looks if bucket in look["perplexity"]}
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if finite:
            return min(finite, key=lambda step: (finite[step], -step))
    return None

"""Shares that follow the losses: a source on which the model is worse gets more of what its role has.

The weights are those of Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406): proportional to the exponential of a
source's training loss. Two things differ. Only sources of one role compete, so that the share of replay stays what was
asked for; and what was asked for stays the prior, from which no source moves further than a bound. Bounded sources
are all drawn often, so none of that method's exploration is needed.
"""

import math
from collections.abc import Mapping

STEPS = 64  # to a factor of two: weights take few values, so the last bits of a loss decide nothing


def adapted_weights(
    asked: Mapping[str, float], roles: Mapping[str, str], losses: Mapping[str, float], strength: float, bound: float
) -> dict[str, float]:
    """Shares of tokens of each source; every role has in all what was asked for it.

    Args:
        asked: shares by name.
        roles: of each source.
        losses: mean training loss (nats a token) since the last decision; sources without one keep their place.
        strength: of a difference of one nat, as an exponent.
        bound: the most a share may be multiplied or divided by, within its role.
    """
    adapted = {}
    for role in dict.fromkeys(roles.values()):
        names = [name for name in asked if roles[name] == role]
        known = [losses[name] for name in names if name in losses]
        middle = sum(known) / len(known) if known else 0.0
        factors = {name: _factor(strength * (losses.get(name, middle) - middle), bound) for name in names}
        total, raised = sum(asked[name] for name in names), sum(asked[name] * factors[name] for name in names)
        adapted |= {name: asked[name] * factors[name] * total / raised for name in names}
    return adapted


def _factor(exponent: float, bound: float) -> float:
    most = math.log2(bound)
    return 2.0 ** (round(min(max(exponent / math.log(2), -most), most) * STEPS) / STEPS)

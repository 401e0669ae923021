"""Shares that follow the losses: a source on which the model is worse gets more of what its role has.

The weights are those of Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406): proportional to the exponential of a
source's training loss. Two things differ. Only sources of one role compete, so that the share of replay stays what was
asked for; and what was asked for stays the prior, from which no source moves further than a bound. Bounded sources
are all drawn often, so none of that method's exploration is needed.
"""

import math
from collections.abc import Mapping

MOST_DOUBLINGS = 32
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
        wanted = {name: asked[name] * _factor(strength * (losses.get(name, middle) - middle)) for name in names}
        adapted |= _within({name: asked[name] for name in names}, wanted, bound)
    return adapted


def _factor(exponent: float) -> float:
    steps = round(min(max(exponent / math.log(2), -MOST_DOUBLINGS), MOST_DOUBLINGS) * STEPS)
    return 2.0 ** (steps / STEPS)


def _within(asked: dict[str, float], wanted: dict[str, float], bound: float) -> dict[str, float]:
    """``wanted`` scaled to the sum of ``asked``, each at most ``bound`` times more or less than was asked for."""
    total, held = sum(asked.values()), {}
    while len(held) < len(asked):
        free = {name: share for name, share in wanted.items() if name not in held}
        scale = (total - sum(held.values())) / sum(free.values())
        limits = {name: (asked[name] / bound, asked[name] * bound) for name in free}
        over = {name: most for name, (_, most) in limits.items() if free[name] * scale > most}
        under = {name: least for name, (least, _) in limits.items() if free[name] * scale < least}
        if not over and not under:
            return held | {name: share * scale for name, share in free.items()}
        # one side at a time: holding the side that is further out can bring the other back
        too_much = sum(free[name] * scale - most for name, most in over.items())
        too_little = sum(least - free[name] * scale for name, least in under.items())
        held |= over if too_much >= too_little else under
    return held

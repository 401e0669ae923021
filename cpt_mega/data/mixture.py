"""What share of the tokens each source has, as a function of the tokens drawn: fixed, or piecewise linear.

A mixture holds no state. What a source is entitled to between two places of a run is the integral of its share, which has a
closed form, so that an order drawn by it is the same however the run is cut into batches and restarts.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cpt_mega.errors import InputError

FIELD = "data.curriculum"
MOST_RAISED = 0.9  # of the tokens, for what is raised
MOST_WEIGHT = 1e100  # far from where sums would overflow


@dataclass(frozen=True)
class Mixture:
    """Shares of sources.

    Attributes:
        names: of the sources.
        points: ``(tokens of the run, share of each source)``, ascending from 0; shares sum to 1. Between two points
            shares change linearly, behind the last one they stay.
    """

    names: tuple[str, ...]
    points: tuple[tuple[int, tuple[float, ...]], ...]

    @classmethod
    def fixed(cls, weights: Mapping[str, float], field: str = FIELD) -> "Mixture":
        """The same shares all the time; weights in any unit. ``field`` names them in errors."""
        return cls.of([(0, weights)], field)

    @classmethod
    def of(cls, points: Sequence[tuple[int, Mapping[str, float]]], field: str = FIELD) -> "Mixture":
        """Shares at places of a run, in any unit; before the first they are what they are there.

        Raises InputError when places do not ascend, names differ, or weights are no shares.
        """
        names = tuple(points[0][1])
        for (before, _), (after, _) in pairwise(points):
            if before >= after:
                raise InputError(f"{field} tokens", after, f"points ascend; this one follows {before}")
        for tokens, weights in points:
            _check(tokens, weights, names, field)
        for index, name in enumerate(names):
            if not any(list(weights.values())[index] for _, weights in points):
                raise InputError(
                    f"{FIELD} {name}", 0, "has no share anywhere; leave the source out to train without it"
                )
        shares = [(tokens, _normalised([weights[name] for name in names])) for tokens, weights in points]
        start = [(0, shares[0][1])] if shares[0][0] > 0 else []
        return cls(names, tuple(start + shares))

    def shares(self, tokens: float) -> tuple[float, ...]:
        """Share of each source at a place of the run."""
        index = self._piece(tokens)
        (begin, at), (end, then) = self.points[index], self._next(index)
        if end == math.inf:
            return at
        part = (tokens - begin) / (end - begin)
        return tuple(a + (b - a) * part for a, b in zip(at, then, strict=True))

    def entitled(self, source: int, begin: float, end: float) -> float:
        """Tokens that are due to a source, by its index, from one place of the run to another."""
        return self._integral(source, end) - self._integral(source, begin)

    def deadline(self, source: int, begin: float, amount: float) -> float:
        """The last place of the run up to which no more tokens since ``begin`` are due to a source; infinite without one.

        What is due already, a negative amount, is due at ``begin``.
        """
        wanted = max(amount, 0.0) + self._integral(source, begin)
        index = bisect_right(self._sums(source), wanted) - 1
        place, at = self.points[index][0], self.points[index][1][source]
        left = wanted - self._sums(source)[index]
        end, then = self._next(index)
        slope = 0.0 if end == math.inf else (then[source] - at) / (end - place)
        # at x + slope x^2 / 2 = left, in the form that loses no digits when the slope is small
        root = math.sqrt(max(at * at + 2 * slope * left, 0.0))
        if at + root == 0:  # no share here: none ever, or one that only begins to grow
            return place if slope > 0 else math.inf
        return place + 2 * left / (at + root)

    def without(self, source: int, tokens: int) -> "Mixture | None":
        """From a place of the run on the others, at each point in their own proportions.

        Where none of them has a share they have those of the next point at which any has. None when there is no such point:
        nothing that is asked for is left.
        """
        later = [(tokens, self.shares(tokens)), *(point for point in self.points if point[0] > tokens)]
        rest = [(at, shares[:source] + shares[source + 1 :]) for at, shares in later]
        filled: list[tuple[int, tuple[float, ...]]] = []
        for index, (at, _) in enumerate(rest):
            shares = next((shares for _, shares in rest[index:] if any(shares)), None)
            if shares is None:
                return None
            filled.append((at, _normalised(shares)))
        start = [(0, filled[0][1])] if tokens > 0 else []
        return Mixture(self.names[:source] + self.names[source + 1 :], tuple(start + filled))

    def raised(self, names: Collection[str], share: float) -> "Mixture":
        """With so much more for some sources together at each point, 90 % at most; the others give way in proportion.

        Points at which these sources have nothing, or all, stay as they are.
        """
        within = [name in names for name in self.names]
        return Mixture(self.names, tuple((tokens, _raised(shares, within, share)) for tokens, shares in self.points))

    def to_json(self) -> list:
        """Plain values; ``from_json`` gives the same mixture back."""
        return [[tokens, dict(zip(self.names, shares, strict=True))] for tokens, shares in self.points]

    @classmethod
    def from_json(cls, value: list) -> "Mixture":
        """Raises ValueError, KeyError or TypeError for what ``to_json`` does not make."""
        names = tuple(map(str, value[0][1]))
        points = tuple((int(at), tuple(float(shares[name]) for name in names)) for at, shares in value)
        places = [at for at, _ in points]
        if places[0] != 0 or places != sorted(set(places)) or not all(0 <= s <= 1 for _, some in points for s in some):
            raise ValueError("places of a mixture ascend from 0, and its shares lie between 0 and 1")
        return cls(names, points)

    def _piece(self, tokens: float) -> int:
        return max(0, bisect_right(self.points, tokens, key=lambda point: point[0]) - 1)

    def _next(self, index: int) -> tuple[float, tuple[float, ...]]:
        return self.points[index + 1] if index + 1 < len(self.points) else (math.inf, self.points[index][1])

    def _sums(self, source: int) -> list[float]:
        """Tokens due to a source from the beginning of the run to each point."""
        sums = [0.0]
        for (begin, at), (end, then) in pairwise(self.points):
            sums.append(sums[-1] + (end - begin) * (at[source] + then[source]) / 2)
        return sums

    def _integral(self, source: int, tokens: float) -> float:
        index = self._piece(tokens)
        begin, at = self.points[index]
        return self._sums(source)[index] + (tokens - begin) * (at[source] + self.shares(tokens)[source]) / 2


def _check(tokens: int, weights: Mapping[str, float], names: Sequence[str], field: str) -> None:
    if set(weights) != set(names):
        odd = sorted(set(weights) ^ set(names))[0]
        fix = f"every point gives a weight to each of {', '.join(names)}, and to no other"
        raise InputError(f"{field} weights", odd, fix)
    for name, weight in weights.items():
        if not (isinstance(weight, int | float) and 0 <= weight <= MOST_WEIGHT):
            raise InputError(f"{field} {name}", weight, "a weight is a share of tokens, 0 or more")
    if not sum(weights.values()):
        raise InputError(f"{field} tokens", tokens, "at this point no source has a share")


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _raised(shares: Sequence[float], within: Sequence[bool], more: float) -> tuple[float, ...]:
    now = math.fsum(share for share, inside in zip(shares, within, strict=True) if inside)
    wanted = max(now, min(MOST_RAISED, now + more))
    if not 0 < now < 1 or wanted == now:
        return tuple(shares)
    up, down = wanted / now, (1 - wanted) / (1 - now)
    return _normalised([share * (up if inside else down) for share, inside in zip(shares, within, strict=True)])

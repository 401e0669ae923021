"""Has a model become worse at fixed items than it was at step 0? Pure: their scores before and now in, numbers out.

Every item is its own control, so only items whose score changed say anything. A drop is tested against a margin, not
against zero: with enough items any difference is significant, and a gate is there for those that matter. A run looks many
times at the same items, so each look has ``alpha / looks`` of the error that the run may make; that holds however the looks
are correlated.

``judge`` is the rule of a gate. Items are split for good into a main panel, scored at every look, and a reserve, scored when
the main panel fires. With the threshold tau, a hit is confirmed when (1) the main panel shows a drop above the margin tau / 2
at the weak level of 10 %, (2) so does the reserve alone, and (3) both together do at ``alpha / looks``. Only (3) bounds
false alarms; (1) saves scoring the reserve, and (2) is the confirmation by items that did not raise the hit.

What was weighed, by ``tools/bench/gate_simulation.py``: alpha 5 %, 50 looks, items correlated over looks, 10 % discordant
without a drop, tau 2 points, 2,896 items in both panels as ``gate_items`` says (4 points with 815 give the same picture). First
the runs with a true drop of tau / 2 that alarm within 50 looks, then those of 2 tau that are found within two looks:

- the point estimate above tau: 40 % and all; McNemar's test at 5 %: 96 % and all, and at ``alpha / looks``: 50 % and all. None
  of them tests what is asked. Against the margin, but at 5 % at every look: 38 % and all.
- the main panel against the margin at ``alpha / looks``, the reserve behind it at 5 %: 0.2 % and 74 %, since half of the items
  have to do what takes all of them.
- both panels at ``sqrt(alpha / looks)``, enough for independent ones: 2.5 % and 95.0 %.
- the rule here: 3.0 % and 98.1 %; one test of all items at every look, without a confirmation: 3.2 % and 98.5 %. Without any
  drop none alarms, and 11 % ever score the reserve. With 4 points: 3.0 % and 99.5 % where looks differ as much as they can,
  0.2 % and 97.5 % where all find the same.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from scipy import special, stats
from scipy.optimize import brentq

SHOWS = 0.1  # level at which each panel alone must show the drop; all items together have to at a look's own
_CONFIDENCE = 0.95  # of the intervals, which are shown and decide nothing
_OUTSIDE = 1e-6  # error allowed to the interval of the discordant share; in the p-value
_SHARES = 48  # tried within it
_ALL_BUT = 1e-12  # of the probability of a number of discordant items, left out of a sum at either end
_SAME = 1e-9  # statistics are equal that differ by less


@dataclass(frozen=True)
class Comparison:
    """Items against their step-0 scores.

    Attributes:
        n: items.
        drop: mean of before minus now; for right or wrong items (lost - gained) / n. Infinite when a score now is not
            finite.
        low, high: its two-sided 95 % confidence interval.
        p_value: one-sided, of the true drop being no larger than ``margin``.
        margin: what was tested against.
        lost, gained: items right before and wrong now, and the other way round; None for continuous scores.
    """

    n: int
    drop: float
    low: float
    high: float
    p_value: float
    margin: float
    lost: int | None = None
    gained: int | None = None


@dataclass(frozen=True)
class Scores:
    """Of the same items in the same order, at step 0 and now. Higher is better, so bits per byte come in negated."""

    before: Sequence[float] | np.ndarray
    now: Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Decision:
    """What a gate finds at one look.

    Attributes:
        fired: the main panel shows a drop beyond the margin, at a weak level: score the reserve.
        confirmed: the reserve shows it too, and all items together do at ``level``: act.
        p_value: of all items together; 1 where either panel does not show it. For ``holm`` over several gates.
        level: alpha / looks.
        main, reserve, together: the numbers; the last two are None where the main panel did not fire or there was no
        reserve.
    """

    fired: bool
    confirmed: bool
    p_value: float
    level: float
    main: Comparison
    reserve: Comparison | None
    together: Comparison | None


@dataclass(frozen=True)
class Panels:
    """Ids of a suite's items, in the order that they were given in."""

    main: tuple[str, ...]
    reserve: tuple[str, ...]


Test = Callable[[np.ndarray, np.ndarray, float], Comparison]


def right_or_wrong(before: np.ndarray, now: np.ndarray, margin: float = 0.0) -> Comparison:
    """Compares items that are right (1) or wrong (0). Raises ValueError for other scores, see ``compare_counts``."""
    before, now = _aligned(before, now)
    for scores in (before, now):
        if not ((scores == 0) | (scores == 1)).all():
            raise ValueError("scores of right or wrong items are 0 and 1")
    before, now = before > 0, now > 0
    lost, gained = int(np.count_nonzero(before & ~now)), int(np.count_nonzero(now & ~before))
    return compare_counts(before.size, lost, gained, margin)


@lru_cache(maxsize=1 << 16)
def compare_counts(n: int, lost: int, gained: int, margin: float = 0.0) -> Comparison:
    """Compares right or wrong items by what was lost and gained, with an exact unconditional test.

    The discordant share is not known. So the p-value is the probability of a table at least as extreme, by Tango's score
    statistic (1998), at that share within its 1 - 1e-6 confidence interval where it is largest (48 are tried), plus 1e-6
    (Berger and Boos 1994). The interval of the drop inverts that statistic.

    McNemar's exact test, lost ~ Binomial(m, (1 + margin * n / m) / 2) given m discordant items, was not taken. Without a
    margin it is exact and wastes level; with one it is not exact, as m / n stands in for the true share. Its true error
    at a nominal 0.1 %, summed over all tables, is 0.06 to 0.07 % with 500 items of which 10 % are discordant (margins of 0
    to 2 points), but 0.35 % with 2,000 items, 3 % and 2 points. Tango's normal approximation has 0.09 to 0.10 % and 0.14 %,
    and 0.27 % with 500 items, 3 % and 2 points. This test has 0.08 to 0.09 %, 0.07 % and 0.09 %, and nowhere too much.

    Raises ValueError for counts that are none and margins outside of [0, 1).
    """
    if not (n >= 1 and lost >= 0 and gained >= 0 and lost + gained <= n):
        raise ValueError(f"{lost} lost and {gained} gained of {n} items")
    if not 0 <= margin < 1:
        raise ValueError(f"a margin of {margin}")
    low, high = _score_interval(n, lost, gained)
    return Comparison(n, (lost - gained) / n, low, high, _exact_p(n, lost, gained, margin), margin, lost, gained)


def mean_drop(before: np.ndarray, now: np.ndarray, margin: float = 0.0) -> Comparison:
    """Compares continuous scores (log-likelihoods, bits per byte negated): a paired t-test of their mean difference.

    It is approximate where differences are skewed. With a long tail of items that became better it errs too often: at a
    nominal 0.1 % in 0.2 % of cases with 500 exponential differences, and in 0.7 % with lognormal ones; with a long tail of
    those that became worse, less often than said. A score now that is not finite is a drop without end. Raises ValueError
    where one before is not finite.
    """
    found = _beyond_a_test(before, now, margin)
    if found is not None:
        return found
    drops = np.subtract(*_aligned(before, now))
    error = stats.sem(drops)
    reach = stats.t.isf((1 - _CONFIDENCE) / 2, drops.size - 1) * error
    p_value = float(stats.ttest_1samp(drops, margin, alternative="greater").pvalue)
    mean = float(drops.mean())
    return Comparison(drops.size, mean, mean - float(reach), mean + float(reach), p_value, margin)


def mean_drop_by_bootstrap(
    before: np.ndarray, now: np.ndarray, margin: float = 0.0, *, resamples: int = 9_999, seed: int = 0
) -> Comparison:
    """As ``mean_drop``, with the studentised bootstrap (Efron and Tibshirani 1993, 12.5) for skewed differences.

    With 100 lognormal differences it errs in 2.5 % of cases at a nominal 1 %, where the t-test does in 5 %. No p-value is below
    1 / (resamples + 1): take twenty times looks / alpha. The same seed gives the same numbers. Resampled items that are
    all alike, whose error is zero, count as evidence against a drop.
    """
    found = _beyond_a_test(before, now, margin)
    if found is not None:
        return found
    drops = np.subtract(*_aligned(before, now))
    mean, error = float(drops.mean()), float(stats.sem(drops))

    def distance(sample: np.ndarray, axis: int) -> np.ndarray:
        errors, away = stats.sem(sample, axis=axis), sample.mean(axis=axis) - mean
        return np.divide(away, errors, out=np.full_like(away, np.inf), where=errors > 0)

    draws = {"n_resamples": resamples, "rng": np.random.default_rng(seed), "method": "percentile"}
    batch = max(1, 4_000_000 // drops.size)  # 32 MB at a time
    found = stats.bootstrap((drops,), distance, vectorized=True, batch=batch, **draws).bootstrap_distribution
    p_value = (1 + np.count_nonzero(found >= (mean - margin) / error)) / (resamples + 1)
    outside = (1 - _CONFIDENCE) / 2
    least, most = np.quantile(found, (outside, 1 - outside), method="inverted_cdf")
    return Comparison(drops.size, mean, mean - float(most) * error, mean - float(least) * error, float(p_value), margin)


def self_disagreement(first: Sequence[float], second: Sequence[float]) -> float:
    """Mean absolute difference of two scorings of one model: of right or wrong items, the share that changed."""
    first, second = _aligned(first, second)
    return float(np.abs(first - second).mean())


def gate_margin(tau: float, noise: float = 0.0) -> float:
    """What a gate with the threshold ``tau`` tests against: tau / 2, and all of the noise.

    Args:
        noise: ``self_disagreement`` of a baseline scored twice.

    Noise that falls either way item by item is in the test already, as discordant items. But a scoring can move all items
    by the same little (another kernel, another order of summation), and then those on the edge fall together. Where a
    share r disagrees with itself, a scoring in which all of them fall to the wrong side loses r, which is no drop.
    """
    return tau / 2 + noise


def look_level(alpha: float, looks: int) -> float:
    """The level of each of so many planned looks (Bonferroni: valid however they are correlated). Raises ValueError."""
    if not (0 < alpha < 1 and looks >= 1):
        raise ValueError(f"alpha {alpha} over {looks} looks")
    return alpha / looks


def judge(
    main: Scores,
    reserve: Scores | None,
    *,
    tau: float,
    alpha: float,
    looks: int,
    noise: float = 0.0,
    test: Test = right_or_wrong,
) -> Decision:
    """Decides at one look whether a suite has dropped; the rule and its reasons stand at the top of this module.

    Args:
        main, reserve: scores of the two panels; without the reserve nothing is confirmed. It is not looked at unless the
            main panel fires: ask without it, score it if ``fired``, and ask again.
        tau: what the gate is for, above 0: a run whose true drop stays at tau / 2 is alarmed with a probability of at
            most ``alpha``, one of 2 tau is found in 95 % of cases with ``gate_items`` items.
        looks: planned in the run; no more may be made at this alpha.
        noise: see ``gate_margin``.
        test: ``right_or_wrong`` or ``mean_drop``.

    Of several gates those act that ``holm({gate: decision.p_value, ...}, look_level(alpha, looks))`` names; those that did
    not fire count among them. Raises ValueError for scores that do not belong together and a tau that is none.
    """
    if not tau > 0:
        raise ValueError(f"a threshold of {tau}")
    level, margin = look_level(alpha, looks), gate_margin(tau, noise)
    found = test(*_aligned(main.before, main.now), margin)
    fired = found.p_value <= SHOWS
    if not fired or reserve is None:
        return Decision(fired, False, 1.0, level, found, None, None)
    again = test(*_aligned(reserve.before, reserve.now), margin)
    both = [np.concatenate(pair) for pair in ((main.before, reserve.before), (main.now, reserve.now))]
    together = test(*both, margin)
    p_value = together.p_value if again.p_value <= SHOWS else 1.0
    return Decision(fired, p_value <= level, p_value, level, found, again, together)


def holm(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Those of several hypotheses that are rejected; any wrongly with a probability of at most ``alpha`` (Holm 1979).

    A p-value that is not a number rejects nothing, but counts.
    """
    known = {name: 1.0 if math.isnan(value) else value for name, value in p_values.items()}
    rejected: set[str] = set()
    for name in sorted(known, key=known.get):
        if known[name] > alpha / (len(known) - len(rejected)):
            break
        rejected.add(name)
    return rejected


def detectable_drop(n: int, discordant_share: float, alpha: float, power: float, margin: float = 0.0) -> float:
    """The smallest true drop that n items show to be above ``margin`` with the given power; infinite where there is none.

    Args:
        discordant_share: of items that are lost or gained, at that drop; where it is below the drop, the drop is taken.

    The normal approximation for paired shares (Connor 1987), with a margin. Raises ValueError as ``items_needed``.
    """
    if items_needed(1.0, discordant_share, alpha, power, margin) > n:
        return math.inf
    least, most = margin, 1.0
    while most - least > 1e-9:  # more items are needed for a smaller drop, so halving finds it
        middle = (least + most) / 2
        if middle > margin and items_needed(middle, discordant_share, alpha, power, margin) <= n:
            most = middle
        else:
            least = middle
    return most


def items_needed(drop: float, discordant_share: float, alpha: float, power: float, margin: float = 0.0) -> int:
    """How many items show a true drop to be above ``margin``, one-sided at ``alpha``, with the given power.

    Raises ValueError where no number of them does, as the drop is no larger than the margin, and for what is no share.
    """
    shares = 0 < drop <= 1 and 0 <= discordant_share <= 1 and 0 < alpha < 1 and 0 < power < 1
    if not shares or not 0 <= margin < drop:
        raise ValueError(f"drop {drop}, margin {margin}, {discordant_share} discordant, alpha {alpha}, power {power}")
    share = max(discordant_share, drop)
    at_margin, at_drop = math.sqrt(share - margin**2), math.sqrt(share - drop**2)
    reach = float(special.ndtri(1 - alpha)) * at_margin + float(special.ndtri(power)) * at_drop
    return max(1, math.ceil((max(reach, 0.0) / (drop - margin)) ** 2))


def gate_items(
    tau: float, discordant_share: float, alpha: float, looks: int, power: float = 0.97, noise: float = 0.0
) -> int:
    """How many items, both panels together, a gate needs to find a drop of 2 tau: as many as carry the threshold.

    Args:
        discordant_share: at that drop. What differs between healthy looks, plus 2 tau, is the most where the drop comes on
            top of it.
        power: of the test of all items. Each of two halves must show the drop as well, which takes 2 points of the 97 %:
            95 % are found at one look.

    Raises ValueError where the noise leaves nothing to find.
    """
    return items_needed(2 * tau, discordant_share, look_level(alpha, looks), power, gate_margin(tau, noise))


def smallest_threshold(items: int, alpha: float, looks: int, discordant_share: float = 0.1) -> float:
    """The smallest tau, to a thousandth of itself, that so many items carry, both panels together; infinite where none is.

    Args:
        discordant_share: without a drop; that of the threshold comes on top of it.
    """

    def carries(tau: float) -> bool:
        return gate_items(tau, min(1.0, discordant_share + 2 * tau), alpha, looks) <= items

    least, most = 0.0, 0.5
    if not carries(most):
        return math.inf
    while most - least > 1e-3 * most:  # fewer items are needed for a larger one, so halving finds it
        middle = (least + most) / 2
        least, most = (least, middle) if carries(middle) else (middle, most)
    return most


def split_panels(item_ids: Iterable[str], seed: int, reserve_share: float = 0.5) -> Panels:
    """Splits a suite's items into a main and a reserve panel, for good: by a hash of each id and the suite's seed.

    An item stays where it is when others are added or their order changes. Halves need the fewest items for ``judge``.
    Raises ValueError for an id that comes twice, and for a share outside of (0, 1).
    """
    if not 0 < reserve_share < 1:
        raise ValueError(f"a reserve share of {reserve_share}")
    ids = tuple(item_ids)
    if len(set(ids)) < len(ids):
        raise ValueError("an item id comes twice")
    held = {item for item in ids if _place(item, seed) < reserve_share}
    return Panels(tuple(item for item in ids if item not in held), tuple(item for item in ids if item in held))


def _place(item: str, seed: int) -> float:
    """Of an item in [0, 1)."""
    return (int.from_bytes(hashlib.sha256(f"{seed}\0{item}".encode()).digest()[:8], "big") >> 11) / 2**53


def _aligned(before: Sequence[float], now: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    before, now = np.asarray(before, np.float64), np.asarray(now, np.float64)
    if before.ndim != 1 or before.shape != now.shape or before.size == 0:
        raise ValueError(f"scores of the same items are needed, not {before.shape} and {now.shape}")
    return before, now


def _beyond_a_test(before: Sequence[float], now: Sequence[float], margin: float) -> Comparison | None:
    """Of continuous scores that need no test: not finite, all changed alike, a single one. None for all others."""
    before, now = _aligned(before, now)
    if not np.isfinite(before).all():
        raise ValueError("a score from before is not finite")
    if not np.isfinite(now).all():
        return Comparison(before.size, math.inf, math.inf, math.inf, 0.0, margin)
    drops = before - now
    mean = float(drops.mean())
    if drops.size == 1:
        return Comparison(1, mean, -math.inf, math.inf, 1.0, margin)
    if np.ptp(drops) <= _SAME * np.abs(np.concatenate((before, now))).max():
        return Comparison(drops.size, mean, mean, mean, float(mean <= margin), margin)
    return None


def _score(n: int, lost: np.ndarray, gained: np.ndarray, drop: float) -> np.ndarray:
    """Tango's statistic: how far the drop found lies above ``drop``, in the deviations that it has if that is true.

    The share gained is the likeliest under that restriction, the larger root of a quadratic equation.
    """
    second = (2 * n - lost + gained) * drop - lost - gained
    share = (np.sqrt(np.maximum(second**2 + 8 * n * gained * drop * (1 - drop), 0)) - second) / (4 * n)
    variance = np.maximum(n * (2 * share + drop * (1 - drop)), 0)
    away = lost - gained - n * drop
    return np.divide(away, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)


def _exact_p(n: int, lost: int, gained: int, margin: float) -> float:
    found, discordant = float(_score(n, np.float64(lost), np.float64(gained), margin)), lost + gained
    least = special.betaincinv(discordant, n - discordant + 1, _OUTSIDE / 2) if discordant else 0.0
    most = special.betainccinv(discordant + 1, n - discordant, _OUTSIDE / 2) if discordant < n else 1.0
    least = min(max(least, margin, _ALL_BUT), 1.0)
    shares = np.linspace(least, max(least, most), _SHARES)[:, None]
    numbers = np.arange(stats.binom.ppf(_ALL_BUT, n, shares[0, 0]), stats.binom.isf(_ALL_BUT, n, shares[-1, 0]) + 1)
    extreme = _least_extreme(n, numbers, found, margin)
    of_number = np.exp(
        special.gammaln(n + 1) - special.gammaln(numbers + 1) - special.gammaln(n - numbers + 1)
        + special.xlogy(numbers, shares) + special.xlog1py(n - numbers, -shares)
    )  # fmt: skip
    wrong = np.minimum((1 + margin / shares) / 2, 1.0)
    within = np.clip(extreme, 1, np.maximum(numbers, 1))  # where the incomplete beta function is a binomial's tail
    tail = special.betainc(within, np.maximum(numbers, 1) - within + 1, wrong)
    tail = np.where(extreme <= 0, 1.0, np.where(extreme > numbers, 0.0, tail))
    return min(1.0, float((of_number * tail).sum(axis=1).max()) + _OUTSIDE)


def _least_extreme(n: int, numbers: np.ndarray, found: float, margin: float) -> np.ndarray:
    """Of so many discordant items, the fewest lost that are as extreme as what was found; one more where none are.

    The statistic rises with the items lost among them, so halving finds it.
    """
    least, most = np.zeros_like(numbers), numbers + 1
    while (least < most).any():
        middle = np.floor((least + most) / 2)
        is_extreme = _score(n, middle, numbers - middle, margin) >= found - _SAME
        least, most = np.where(is_extreme | (least >= most), least, middle + 1), np.where(is_extreme, middle, most)
    return least


def _score_interval(n: int, lost: int, gained: int) -> tuple[float, float]:
    """Drops that Tango's statistic does not reject."""
    far, drop = float(special.ndtri((1 + _CONFIDENCE) / 2)), (lost - gained) / n
    away = partial(_score, n, np.float64(lost), np.float64(gained))

    def end(at: float, of: float) -> float:
        return (
            math.copysign(1.0, at)
            if away(at) * of < far
            else brentq(lambda value: float(away(value)) * of - far, at, drop)
        )

    edge = 1 - 1e-12
    return end(-edge, 1.0), end(edge, -1.0)

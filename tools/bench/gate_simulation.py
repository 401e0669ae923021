"""Does a gate over fixed items alarm only where it should? Runs with a known drop, judged by several rules.

    python tools/bench/gate_simulation.py [--tau 0.02 0.04] [--runs 400] [--items ITEMS.jsonl]

A run has so many looks at the same items, so its looks are correlated. Its true drop is there from the first look on and
stays: nothing, half of the threshold tau, tau, or twice tau. Alarms are counted over all looks, detections within the first
two. A rule should alarm in at most 5 % of runs at tau / 2 and detect at least 95 % at 2 tau; ``judge`` is the one in the
package, the others are written here. Exit code 1 when ``judge`` misses that by more than chance.

Items are of a latent-margin model, unless they are given: an item is answered rightly while its margin is above 0. The
margin is a part of its own (how hard it is), a part drawn anew for step 0 and for the looks, which among themselves follow
an AR(1) process with ``--correlation`` from one look to the next, and the model's drift, equal for all items, which makes
the drop. Without drift ``--discordant`` of the items differ from step 0. At correlation 1 all looks find the same.

``--items`` resamples real ones: lines of ``probe``, ``id``, ``step`` and ``score`` (0 or 1), the smallest step being step 0.
Every item drawn brings its own course over the looks, which are walked to and fro if there are fewer than asked for. What
the file itself lost or gained at a look is made the drop that is asked for by flipping items, the same ones at every look.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import optimize, stats

from cpt_mega.gates.paired import Decision, Scores, gate_items, judge

ALPHA, EARLY, TARGET = 0.05, 2, 0.95
MOST_SCORES = 4_000_000  # held at once: runs times items


class Items(Protocol):
    """Where items come from."""

    def draw(self, rng: np.random.Generator, runs: int, n: int, drop: float, looks: int) -> tuple[np.ndarray, Iterator]:
        """Whether n items of each run are right before, and an iterator over the looks of whether they are then."""

    def discordant_at(self, drop: float) -> float:
        """The share of items that differ from step 0, at a look with this drop; the most of all looks."""


@dataclass(frozen=True)
class Latent:
    """The model above.

    Attributes:
        accuracy: at step 0.
        discordant: share that differs between step 0 and any look, without a drop.
        correlation: of an item's changing part from one look to the next.
    """

    accuracy: float = 0.6
    discordant: float = 0.1
    correlation: float = 0.8

    def draw(self, rng, runs, n, drop, looks):
        mean = float(stats.norm.ppf(self.accuracy))
        own = self.own_share(mean)
        drift = mean - float(stats.norm.ppf(self.accuracy - drop))

        def normal() -> np.ndarray:
            return rng.standard_normal((runs, n), dtype=np.float32)

        hard = math.sqrt(own) * normal() + np.float32(mean)
        scale = np.float32(math.sqrt(1 - own))

        def each() -> Iterator[np.ndarray]:
            part = normal()
            for look in range(looks):
                if look:
                    part = self.correlation * part + math.sqrt(1 - self.correlation**2) * normal()
                yield hard + scale * part > drift

        return hard + scale * normal() > 0, each()

    def discordant_at(self, drop):
        mean = float(stats.norm.ppf(self.accuracy))
        now, own = float(stats.norm.ppf(self.accuracy - drop)), self.own_share(mean)
        both = stats.multivariate_normal.cdf([mean, now], cov=[[1, own], [own, 1]])
        return float(2 * (self.accuracy - both) - drop)

    def own_share(self, mean: float) -> float:
        """What of an item's variance never changes: it makes ``discordant`` of the items differ between two draws."""

        def differ(share: float) -> float:
            both = stats.multivariate_normal.cdf([mean, mean], cov=[[1, share], [share, 1]])
            return 2 * (self.accuracy - both) - self.discordant

        return float(optimize.brentq(differ, 0.0, 1 - 1e-6))


@dataclass(frozen=True)
class Recorded:
    """Real items: whether each is right, ``[items, 1 + looks]``, step 0 first."""

    right: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """Items that were scored at every step of the file. Raises ValueError for scores other than 0 and 1."""
        found: dict[tuple, dict[int, float]] = {}
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault((line["probe"], line["id"]), {})[line["step"]] = line["score"]
        steps = sorted({step for course in found.values() for step in course})
        courses = [[course[step] for step in steps] for course in found.values() if len(course) == len(steps)]
        right = np.array(courses, float)
        if right.ndim != 2 or right.shape[1] < 2 or not np.isin(right, (0, 1)).all():
            raise ValueError(f"{path}: items with a score of 0 or 1 at two steps or more are needed")
        return cls(right > 0)

    def draw(self, rng, runs, n, drop, looks):
        chosen = rng.integers(len(self.right), size=(runs, n))
        luck = rng.random((runs, n), dtype=np.float32)  # an item's, at every look
        last = self.right.shape[1] - 1

        def each() -> Iterator[np.ndarray]:
            for look in range(looks):
                place = look % max(1, 2 * last - 2)
                column = self.right[:, 1 + min(place, 2 * last - 2 - place)]
                lose, gain = self.flips(column, drop)
                now = column[chosen]
                yield np.where(now, luck >= lose, luck < gain)

        return self.right[:, 0][chosen], each()

    def discordant_at(self, drop):
        before = self.right[:, 0]
        shares = []
        for column in self.right[:, 1:].T:
            lose, gain = self.flips(column, drop)
            right_now = np.where(column, 1 - lose, gain)  # the probability of it
            shares.append(np.where(before, 1 - right_now, right_now).mean())
        return float(max(shares))

    def flips(self, column: np.ndarray, drop: float) -> tuple[float, float]:
        """Shares of the items right at a look, and of those wrong, that are to flip to make the drop."""
        share, wanted = float(column.mean()), float(self.right[:, 0].mean()) - drop
        if wanted <= share:
            return 1 - wanted / share if share else 0.0, 0.0
        return 0.0, (wanted - share) / (1 - share)


def package_rule(before: np.ndarray, now: np.ndarray, tau: float, looks: int) -> Decision:
    """One run at one look, halves of the items being the panels; the reserve is scored when it is asked for."""
    half = before.size // 2
    main, reserve = Scores(before[:half], now[:half]), Scores(before[half:], now[half:])
    options = {"tau": tau, "alpha": ALPHA, "looks": looks}
    decision = judge(main, None, **options)
    return judge(main, reserve, **options) if decision.fired else decision


def other_rules(tau: float, looks: int) -> dict[str, Callable[..., np.ndarray]]:
    """Alarms of other rules, from lost and gained of the main panel and the reserve: arrays, one number a run."""
    level, margin = ALPHA / looks, tau / 2

    def p_value(lost: np.ndarray, gained: np.ndarray, n: int, margin: float = 0.0) -> np.ndarray:
        """McNemar's exact test, given the discordant items, with the margin in its probability."""
        discordant = lost + gained
        share = np.minimum((1 + margin * n / np.maximum(discordant, 1)) / 2, 1.0)
        return np.where(discordant == 0, 1.0, stats.binom.sf(lost - 1, discordant, share))

    def over_all(test: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda main, reserve, n, m: test(main[0] + reserve[0], main[1] + reserve[1], n + m)

    def panels(first: float, second: float) -> Callable[..., np.ndarray]:
        return lambda main, reserve, n, m: (
            (p_value(*main, n, margin) <= first) & (p_value(*reserve, m, margin) <= second)
        )

    return {
        "estimate above tau": over_all(lambda lost, gained, n: (lost - gained) / n > tau),
        "McNemar at alpha": over_all(lambda *counts: p_value(*counts) <= ALPHA),
        "McNemar at alpha / looks": over_all(lambda *counts: p_value(*counts) <= level),
        "margin at alpha": over_all(lambda *counts: p_value(*counts, margin) <= ALPHA),
        "margin at alpha / looks, no reserve": over_all(lambda *counts: p_value(*counts, margin) <= level),
        "main at alpha / looks, reserve at alpha": panels(level, ALPHA),
        "both at sqrt(alpha / looks)": panels(math.sqrt(level), math.sqrt(level)),
    }


PACKAGE, FIRED = "judge", "(judge asks for the reserve)"


def simulate(
    items: Items, n: int, drop: float, tau: float, looks: int, runs: int, seed: int, *, judged: int, others: bool = True
) -> dict[str, np.ndarray]:
    """Whether each rule alarms, ``[runs, judged]`` by its name.

    Args:
        n: items of both panels together.
        looks: planned; of which ``judged`` are made, the first ones.
        others: also rules that are not the package's.
    """
    rng, rules = np.random.default_rng(seed), other_rules(tau, looks) if others else {}
    alarms = {name: np.zeros((runs, judged), bool) for name in (PACKAGE, FIRED, *rules)}
    half, at_once = n // 2, max(1, MOST_SCORES // n)
    for first in range(0, runs, at_once):
        part = slice(first, min(runs, first + at_once))
        before, courses = items.draw(rng, part.stop - part.start, n, drop, judged)
        for look, now in enumerate(courses):
            decisions = [package_rule(*run, tau, looks) for run in zip(before, now, strict=True)]
            alarms[PACKAGE][part, look] = [decision.confirmed for decision in decisions]
            alarms[FIRED][part, look] = [decision.fired for decision in decisions]
            lost, gained = before & ~now, now & ~before
            main = lost[:, :half].sum(axis=1), gained[:, :half].sum(axis=1)
            reserve = lost[:, half:].sum(axis=1), gained[:, half:].sum(axis=1)
            for name, rule in rules.items():
                alarms[name][part, look] = rule(main, reserve, half, n - half)
    return alarms


def interval(count: int, of: int) -> tuple[float, float]:
    """Wilson's, 95 %."""
    found = stats.binomtest(count, of).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def shown(hits: np.ndarray) -> str:
    low, high = interval(int(hits.sum()), hits.size)
    return f"{hits.mean():.1%} ({low:.1%} to {high:.1%})"


def missed(alarms: np.ndarray, found: np.ndarray) -> bool:
    """Whether alarms at tau / 2 are above 5 %, or detections at 2 tau below 95 %, by more than chance."""
    least, most = interval(int(alarms.sum()), alarms.size)[0], interval(int(found.sum()), found.size)[1]
    return least > ALPHA or most < TARGET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.02, 0.04], help="thresholds, as shares (0.02 0.04)")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.2], help="times gate_items (1 1.2)")
    parser.add_argument("--runs", type=int, default=400, help="of each line; five times as many for two looks (400)")
    parser.add_argument("--looks", type=int, default=50, help="of a run (50)")
    parser.add_argument("--items", type=Path, help="JSONL of real items' results; they replace the latent model")
    parser.add_argument("--accuracy", type=float, default=0.6, help="at step 0 (0.6)")
    parser.add_argument("--discordant", type=float, default=0.1, help="share without a drop (0.1)")
    parser.add_argument("--correlation", type=float, default=0.8, help="from look to look (0.8)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.items is None:
        items = Latent(options.accuracy, options.discordant, options.correlation)
    else:
        items = Recorded.read(options.items)
    console, begin, bad = Console(), time.monotonic(), False
    table = Table(title=f"{items if options.items is None else options.items}", title_justify="left")
    for name in ("rule", "items", "true drop", f"alarms over {options.looks} looks", f"found within {EARLY} looks"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for tau in options.tau:
        for factor in options.factors:
            n = math.ceil(factor * gate_items(tau, items.discordant_at(2 * tau), ALPHA, options.looks))
            bad |= add_rows(table, options, items, tau, n)
            console.print(f"tau {tau:g}, {n:,} items: {time.monotonic() - begin:.0f} s since the start")
    console.print(table)
    return int(bad)


def add_rows(table: Table, options: argparse.Namespace, items: Items, tau: float, n: int) -> bool:
    """All rules at one number of items; whether the package's missed its targets."""
    of_run, of_start = {}, {}
    for drop in (0.0, tau / 2, tau, 2 * tau):
        arguments = (items, n, drop, tau, options.looks)
        if drop <= tau / 2:
            of_run[drop] = simulate(*arguments, options.runs, options.seed, judged=options.looks)
        if drop:
            of_start[drop] = simulate(*arguments, 5 * options.runs, options.seed + 1, judged=EARLY)
    for name in of_run[0.0]:
        for drop in (0.0, tau / 2, tau, 2 * tau):
            cells = [shown(kind[drop][name].any(axis=1)) if drop in kind else "" for kind in (of_run, of_start)]
            table.add_row(name if not drop else "", f"{n:,}" if not drop else "", f"{drop:.3f}", *cells)
    table.add_section()
    at_half, at_twice = of_run[tau / 2][PACKAGE].any(axis=1), of_start[2 * tau][PACKAGE].any(axis=1)
    return missed(at_half, at_twice)


if __name__ == "__main__":
    sys.exit(main())

"""Gates of items: those of a bucket taken together, judged by ``paired.py`` against step 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cpt_mega.gates.paired import Comparison, Decision, Scores, judge, mean_drop, split_panels
from cpt_mega.gates.verdict import CONTINUE, HARD, NONE, SOFT, WARN, LookScores, Verdict, trailing

PANEL_SEED = 1  # another one would move items between the panels of a running suite


@dataclass(frozen=True)
class ItemGate:
    """A gate of items.

    Attributes:
        name: the rule's.
        probes: whose items are taken together.
        binary: whether they are right (1) or wrong (0); else bits per byte, negated.
        threshold: the drop that it is for: a share of the items, or of the bits per byte at step 0.
        action: of a hard verdict.
        patience: looks one behind the other that have to be hard before it acts.
        noise: by how much step 0 disagreed with itself when it was scored twice; in the unit of the threshold.
        disarmed: why it does not judge; empty where it does.
        raised: whether the threshold is above the usual one as the items show no smaller drop; never one that was given.
    """

    name: str
    probes: tuple[str, ...]
    binary: bool
    threshold: float
    action: str
    patience: int = 1
    noise: float = 0.0
    disarmed: str = ""
    raised: bool = False

    def in_words(self, threshold: float) -> str:
        """A drop in this gate's unit: points of right answers, or a share of the bits per byte."""
        return f"{100 * threshold:.3g} points" if self.binary else f"{threshold:.1%} of the bits per byte"


def panel_problem(gate: ItemGate, ids: Mapping[str, Sequence[str]]) -> str:
    """Why a gate could not judge these items, by probe, however their scores fall; empty where it could.

    Each panel must show a drop by itself: it needs an item, and two where a mean is tested, whose error one item does not tell.
    """
    names = {f"{probe}/{item}" for probe in gate.probes for item in ids[probe]}
    panels, least = split_panels(sorted(names), PANEL_SEED), 1 if gate.binary else 2
    sizes = len(panels.main), len(panels.reserve)
    if min(sizes) >= least:
        return ""
    return f"{len(names):,} items fall into panels of {sizes[0]:,} and {sizes[1]:,}, and each needs {least}: give more"


def decide(gate: ItemGate, look: LookScores, alpha: float, looks: int) -> Decision | None:
    """What ``paired.judge`` says of a gate's items; None where neither panel, or only one, has any that both looks know."""
    before, now = _items(gate, look.before), _items(gate, look.now)
    panels = split_panels(sorted(before.keys() & now.keys()), PANEL_SEED)
    if not (panels.main and panels.reserve):
        return None
    scores = [Scores([before[i] for i in ids], [now[i] for i in ids]) for ids in (panels.main, panels.reserve)]
    if gate.binary:
        return judge(*scores, tau=gate.threshold, alpha=alpha, looks=looks, noise=gate.noise)
    size = -float(np.mean(list(before.values())))  # of bits per byte, which come in negated
    tau, noise = gate.threshold * size, gate.noise * size
    return judge(*scores, tau=tau, alpha=alpha, looks=looks, noise=noise, test=mean_drop) if size > 0 else None


def apparent_drop(gate: ItemGate, look: LookScores) -> float:
    """Of all of a gate's items since step 0, in the unit of its threshold, whatever chance has to do with it."""
    before, now = _items(gate, look.before), _items(gate, look.now)
    both = sorted(before.keys() & now.keys())
    size = 1.0 if gate.binary else -float(np.mean(list(before.values())))
    drop = float(np.mean([before[item] - now[item] for item in both])) if both and size > 0 else 0.0
    return drop / size


def verdict_of(
    gate: ItemGate, decision: Decision, confirmed: bool, history: Sequence[Mapping], drop: float = 0.0
) -> Verdict:
    """Hard when it is ``confirmed`` over all gates, which acts after ``patience`` looks; soft when it fired for itself alone.

    Args:
        history: looks before this one, oldest first.
        drop: see ``apparent_drop``; of the threshold or more, a look that is not objected to is doubtful.
    """
    level = HARD if confirmed else SOFT if decision.fired else NONE
    before = [look.get("objections", {}).get(gate.name) for look in history]
    hard = trailing(found == HARD for found in [*before, level])
    action = gate.action if hard >= gate.patience else WARN if level != NONE else CONTINUE
    shown = decision.together or decision.main
    reason = f"{gate.name}: {_words(gate, shown)} since step 0; the gate is for {gate.in_words(gate.threshold)}"
    if level == SOFT:
        reason += ", and the reserve does not confirm it"
    elif level == HARD and hard < gate.patience:
        reason += f"; {hard} of {gate.patience} looks"
    panels = {"main": decision.main, "reserve": decision.reserve, "together": decision.together}
    numbers = {"threshold": gate.threshold, "noise": gate.noise, "level": decision.level, "p_value": decision.p_value}
    numbers |= {name: None if panel is None else asdict(panel) for name, panel in panels.items()}
    return Verdict(gate.name, level, action, reason, numbers, level == NONE and not drop < gate.threshold)


def _words(gate: ItemGate, found: Comparison) -> str:
    if gate.binary:
        drop, low, high = (100 * value for value in (found.drop, found.low, found.high))
        lost = f"{found.lost} items lost and {found.gained} gained of {found.n}"
        return f"{lost}, a drop of {drop:.1f} points (95 %: {low:.1f} to {high:.1f})"
    return f"{found.n} answers need {found.drop:+.3g} bits a byte (95 %: {found.low:+.3g} to {found.high:+.3g})"


def _items(gate: ItemGate, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By probe and id. A model that is lost does not have a right answer."""
    found = {f"{probe}/{item}": score for probe in gate.probes for item, score in scores.get(probe, {}).items()}
    return {name: 0.0 if gate.binary and math.isnan(score) else score for name, score in found.items()}

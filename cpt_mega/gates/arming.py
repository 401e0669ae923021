"""From the rules of a suite to gates: which items each takes, what they can show, and which gate does not judge, and why."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from cpt_mega.config.schedule import LearningRate
from cpt_mega.config.schema import Config
from cpt_mega.errors import InputError
from cpt_mega.gates.item_gates import ItemGate, panel_problem
from cpt_mega.gates.looks import planned_looks
from cpt_mega.gates.paired import self_disagreement, smallest_threshold
from cpt_mega.gates.probes.probe import BITS_PER_BYTE, RIGHT_OR_WRONG, ItemScore, Probe
from cpt_mega.gates.rule_functions import check_names, load_function
from cpt_mega.gates.rules import GainGate, Judge
from cpt_mega.gates.suite import Suite
from cpt_mega.gates.suite_schema import ItemRuleOptions, RuleOptions

GUARDED = ("general", "behaviour", "safety")
USUAL = {
    "general": 0.03,
    "behaviour": 0.05,
    "safety": 0.03,
    "answers": 0.1,
}  # thresholds; the last of the bits per byte
MOST = 0.25  # a gate that was given no threshold goes with what its items can show, up to here


@dataclass(frozen=True)
class Power:
    """What a gate of items can show in a run.

    Attributes:
        items: right or wrong.
        smallest: the threshold that so many carry, as a share of them; infinite where they carry none.
    """

    gate: ItemGate
    items: int
    smallest: float

    def to_json(self) -> dict:
        """Plain values; ``smallest`` is None where there is none, or where it cannot be known before, ``disarmed`` where it
        judges.
        """
        gate, smallest = self.gate, self.smallest if 0 < self.smallest < 1 else None
        told = {"gate": gate.name, "probes": list(gate.probes), "items": self.items, "threshold": gate.threshold}
        told |= {"smallest": smallest, "armed": not gate.disarmed and gate.threshold >= self.smallest}
        return told | {"disarmed": gate.disarmed or None}


def planned_judge(config: Config, suite: Suite) -> Judge:
    """The rules of a run. Without ``gates.suite`` there is general perplexity alone.

    Raises InputError for a threshold below what its items can show, unless that is accepted, and for functions that cannot be
    loaded.
    """
    rules, looks = suite.rules, planned_looks(config)
    gates, gain, functions = (), None, ()
    if rules is not None:
        gates = tuple(_checked(power, suite) for power in powers(rules, suite, looks, config.gates.action))
        gain, functions = _gain(config, rules), rules.functions
        check_names(functions)
        for name in functions:
            load_function(name)
    alpha = RuleOptions().alpha if rules is None else rules.alpha
    limit, action = config.gates.general_perplexity_limit, config.gates.action
    return Judge(gates, alpha, looks, limit, action, gain, functions)


def powers(rules: RuleOptions, suite: Suite, looks: int, action: str = "stop") -> list[Power]:
    """The gates of items that a suite has probes for, and what each can show in so many looks."""
    found = [(bucket, getattr(rules, bucket), _probes(suite, RIGHT_OR_WRONG, [bucket])) for bucket in GUARDED]
    found.append(("answers", rules.answers, _probes(suite, BITS_PER_BYTE, GUARDED)))
    asked = [(name, options, probes) for name, options, probes in found if options is not None and probes]
    return [_power(name, options, probes, rules.alpha / len(asked), looks, action) for name, options, probes in asked]


def notes_on(judge: Judge) -> Iterator[str]:
    """What a user should know of gates that see less than usual, or nothing."""
    for gate in judge.item_gates:
        where = f"rules.{gate.name} of the suite"
        if gate.disarmed:
            yield f"gate {gate.name} is not armed: {gate.disarmed} ({where})"
        elif gate.raised:
            drop, usual = gate.in_words(gate.threshold), gate.in_words(USUAL[gate.name])
            yield f"gate {gate.name} is for drops of {drop}, usual are {usual}: more items show smaller ones ({where})"


def armed(judge: Judge, noise: Mapping[str, float], sizes: Mapping[str, int]) -> Judge:
    """A judge that knows how far step 0, scored twice, disagreed with itself.

    Args:
        noise: ``paired.self_disagreement`` by probe, as a share of its items or of its mean; probes that it lacks have none.
        sizes: items by probe.

    A gate whose noise alone would come to half of its threshold, which leaves it nothing to test against, is disarmed.
    """
    return replace(judge, item_gates=tuple(_with_noise(gate, noise, sizes) for gate in judge.item_gates))


def disagreement(probe: Probe, first: Sequence[ItemScore], second: Sequence[ItemScore]) -> float:
    """Between two scorings of one model: of right or wrong items the share that changed, of others a share of their mean."""
    pairs = [(a.score, b.score) for a, b in zip(first, second, strict=True) if math.isfinite(a.score + b.score)]
    if not pairs:
        return 0.0
    before, now = zip(*pairs, strict=True)
    size = 1.0 if probe.scale == RIGHT_OR_WRONG else abs(fmean(before))
    return self_disagreement(before, now) / size if size else 0.0


def _with_noise(gate: ItemGate, noise: Mapping[str, float], sizes: Mapping[str, int]) -> ItemGate:
    items = sum(sizes[probe] for probe in gate.probes)
    share = sum(noise.get(probe, 0.0) * sizes[probe] for probe in gate.probes) / items
    gate = replace(gate, noise=share)
    if gate.disarmed or share < gate.threshold / 2:
        return gate
    return replace(
        gate, disarmed=f"step 0 scored twice differs by {share:.1%}, and its threshold is {gate.threshold:.1%}"
    )


def _probes(suite: Suite, scale: str, buckets: Sequence[str]) -> list[Probe]:
    return [probe for probe in suite.probes if probe.scale == scale and probe.bucket in buckets]


def _power(
    name: str, options: ItemRuleOptions, probes: Sequence[Probe], alpha: float, looks: int, action: str
) -> Power:
    binary, items = probes[0].scale == RIGHT_OR_WRONG, sum(len(probe.ids) for probe in probes)
    smallest = smallest_threshold(items, alpha, looks) if binary else 0.0
    threshold, disarmed = options.threshold, ""
    if threshold is None:
        threshold = max(USUAL[name], smallest)
        if threshold > MOST:
            threshold, disarmed = USUAL[name], f"{items:,} items show no drop below {100 * MOST:g} points"
    names = tuple(probe.name for probe in probes)
    gate = ItemGate(name, names, binary, threshold, options.action or action, options.patience, disarmed=disarmed)
    raised = options.threshold is None and not disarmed and threshold > USUAL[name]
    problem = disarmed or panel_problem(gate, {probe.name: probe.ids for probe in probes})
    return Power(replace(gate, disarmed=problem, raised=raised), items, smallest)


def _checked(power: Power, suite: Suite) -> ItemGate:
    gate, options = power.gate, getattr(suite.rules, power.gate.name)
    if gate.threshold >= power.smallest or options.accept_blind or options.threshold is None:
        return gate
    can = f"can carry {power.smallest:.3g}" if power.smallest < 1 else "can carry none"
    more = "ask more of the suite's by a higher gates.look_share" if suite.cut else "give more items"
    fix = f"{power.items:,} items {can}; {more}, another threshold, or accept_blind: true"
    raise InputError(f"gates.suite rules.{gate.name}.threshold", gate.threshold, fix)


def _gain(config: Config, rules: RuleOptions) -> GainGate | None:
    if rules.gain is None:
        return None
    options, start = rules.gain, LearningRate.from_config(config).warmup_tokens
    return GainGate(options.threshold, options.price, options.patience, options.action, start, config.train.tokens)

"""Rules: what a look found in, verdicts out. Pure, so that a recorded decision can be derived again.

Three kinds. A gate of items asks ``paired.py`` whether the items of a bucket have dropped since step 0. Perplexity and the gain
in the domain are compared with fixed limits. A function is the user's own. Each says ``none``, ``soft`` (a warning) or
``hard``; what is done about the strongest is its action.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from cpt_mega.gates.item_gates import ItemGate, apparent_drop, decide, verdict_of
from cpt_mega.gates.paired import holm, look_level
from cpt_mega.gates.rule_functions import verdict_by_function
from cpt_mega.gates.verdict import CONTINUE, HARD, NONE, ROLL_BACK, SOFT, STOP, LookScores, Verdict, trailing

PERPLEXITY, GAIN, PRICE = "general_perplexity_limit", "domain_gain", "domain_price"
FLAT = {GAIN, PRICE}  # they find no harm, only too little gain


@dataclass(frozen=True)
class GainGate:
    """Whether the domain becomes better at all.

    Attributes:
        threshold: least fall of the domain loss since step 0, as a share of it.
        price: least fall (nats) per billion tokens between two looks; None: any.
        patience: looks one behind the other that have to miss it.
        from_tokens: looks up to there do not count: the rate is still rising.
        budget_tokens: of the run, to say what is saved.
    """

    threshold: float
    price: float | None
    patience: int
    action: str
    from_tokens: int
    budget_tokens: int


@dataclass(frozen=True)
class Judge:
    """All that verdicts depend on beside scores: a line of the ledger at each start.

    Attributes:
        looks: planned in the run; ``alpha`` is split over them.
        perplexity_limit: share by which general perplexity may rise; None: any.
        perplexity_action: what is done above it.
        functions: of the user's own, ``file.py:function``.
    """

    item_gates: tuple[ItemGate, ...] = ()
    alpha: float = 0.05
    looks: int = 1
    perplexity_limit: float | None = None
    perplexity_action: str = STOP
    gain: GainGate | None = None
    functions: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Plain values; ``from_json`` gives an equal judge back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Judge":
        """Raises ValueError for values that ``to_json`` did not make."""
        gain = values.get("gain")
        try:
            gates = tuple(ItemGate(**{**gate, "probes": tuple(gate["probes"])}) for gate in values["item_gates"])
            rest = {"item_gates": gates, "gain": gain and GainGate(**gain), "functions": tuple(values["functions"])}
            return cls(**{**values, **rest})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no rules: {error}") from error

    @property
    def armed(self) -> list[ItemGate]:
        """Gates of items that judge."""
        return [gate for gate in self.item_gates if not gate.disarmed]

    def may_roll_back(self, measured: Collection[str]) -> bool:
        """Whether a verdict may ask for it; what a function says is not known before. ``measured``: buckets' perplexities."""
        actions = {gate.action for gate in self.armed}
        if self.gain is not None and "domain" in measured:
            actions.add(self.gain.action)
        if self.perplexity_limit is not None and "general" in measured:
            actions.add(self.perplexity_action)
        return ROLL_BACK in actions or bool(self.functions)

    def verdicts(self, look: LookScores, history: Sequence[Mapping]) -> list[Verdict]:
        """What all rules say of a look.

        Args:
            history: looks before this one, oldest first, as a run's state keeps them.

        Raises InputError for a function of the user's that fails.
        """
        found = self._of_items(look, history)
        if self.perplexity_limit is not None:
            found += general_perplexity(look.baseline, look.perplexity, self.perplexity_limit, self.perplexity_action)
        if self.gain is not None:
            found += domain_gain(self.gain, look, history) + domain_price(self.gain, look, history)
        return found + [verdict_by_function(name, look, history) for name in self.functions]

    def _of_items(self, look: LookScores, history: Sequence[Mapping]) -> list[Verdict]:
        decisions = {gate.name: decide(gate, look, self.alpha, self.looks) for gate in self.armed}
        known = {name: decision for name, decision in decisions.items() if decision is not None}
        if not known:
            return []
        p_values = {name: decision.p_value for name, decision in known.items()}
        confirmed = holm(p_values, look_level(self.alpha, self.looks))
        return [
            verdict_of(gate, known[gate.name], gate.name in confirmed, history, apparent_drop(gate, look))
            for gate in self.armed
            if gate.name in known
        ]


def general_perplexity(
    baseline: Mapping[str, float], now: Mapping[str, float], limit: float, action: str = STOP
) -> list[Verdict]:
    """Hard when general perplexity is above its step-0 value by more than ``limit`` (a share; 0.15 is 15 %).

    So is a perplexity that is not a number. Nothing where the run measures no general bucket.
    """
    if "general" not in baseline or "general" not in now:
        return []
    before, after = baseline["general"], now["general"]
    rise = after / before - 1.0
    within = math.isfinite(rise) and rise <= limit
    reason = (
        f"general perplexity {after:.4g} is {rise:+.1%} from its step-0 value {before:.4g}; the limit is +{limit:.0%}"
    )
    numbers = {"baseline": before, "value": after, "rise": rise, "limit": limit}
    level, action = (NONE, CONTINUE) if within else (HARD, action)
    return [Verdict(PERPLEXITY, level, action, reason, numbers)]


def domain_gain(gate: GainGate, look: LookScores, history: Sequence[Mapping]) -> list[Verdict]:
    """Hard when the domain loss lies less than a share below that of step 0, at so many looks one behind the other.

    Nothing where the domain was not measured at step 0: what was gained before is not known.
    """
    base = None if look.since.get("domain", 0) else _loss(look.baseline)
    gains = [
        1 - loss / base
        for tokens, loss in _domain_losses(look, history)
        if base is not None and base > 0 and tokens > gate.from_tokens
    ]
    if not gains:
        return []
    reason = f"domain loss is {gains[-1]:.2%} below its step-0 value; the least is {gate.threshold:.2%}"
    numbers = {"gain": gains[-1], "threshold": gate.threshold}
    return [_flat(gate, look, GAIN, reason, numbers, [not gain >= gate.threshold for gain in gains])]


def domain_price(gate: GainGate, look: LookScores, history: Sequence[Mapping]) -> list[Verdict]:
    """Hard when the domain loss fell by less than the price per billion tokens between each two of so many looks."""
    losses = [pair for pair in _domain_losses(look, history) if pair[0] > gate.from_tokens]
    steps = zip(losses, losses[1:], strict=False)
    falls = [1e9 * (loss - after) / (end - start) for (start, loss), (end, after) in steps if end > start]
    if gate.price is None or not falls:
        return []
    reason = f"domain loss falls by {falls[-1]:.3g} nats per billion tokens; the price is {gate.price:g}"
    numbers = {"fall": falls[-1], "price": gate.price}
    return [_flat(gate, look, PRICE, reason, numbers, [not fall >= gate.price for fall in falls])]


def _flat(gate: GainGate, look: LookScores, rule: str, reason: str, numbers: dict, misses: Sequence[bool]) -> Verdict:
    """``misses``: whether each look so far missed what the rule asks for."""
    missed = trailing(misses)
    level = HARD if missed >= gate.patience else SOFT if missed else NONE
    if missed:
        reason += f", missed at {missed} looks of {gate.patience}" + (_saved(gate, look) if level == HARD else "")
    numbers = numbers | {"missed": missed, "patience": gate.patience}
    return Verdict(rule, level, gate.action if level == HARD else CONTINUE, reason, numbers)


def _domain_losses(look: LookScores, history: Sequence[Mapping]) -> list[tuple[int, float]]:
    """Tokens and mean loss (nats) of every look that measured the domain, this one last."""
    looks = [*((past["tokens"], past["perplexity"]) for past in history), (look.tokens, look.perplexity)]
    return [(tokens, loss) for tokens, values in looks if (loss := _loss(values)) is not None]


def _loss(perplexity: Mapping[str, float]) -> float | None:
    value = perplexity.get("domain")
    return None if value is None else math.log(value) if value > 0 else math.nan


def _saved(gate: GainGate, look: LookScores) -> str:
    left = max(0, gate.budget_tokens - look.tokens)
    return f": {left:,} of {gate.budget_tokens:,} tokens are left" if left else ""

"""What to look at when a run has harmed what its model could do, with the run's own numbers; and what a look says of the stage.

Pure. The order is that in which causes are likely: rate, mixture, data, packing, batches, drift, and then a smaller run.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from cpt_mega.gates.rules import PERPLEXITY

BASE_LR, INSTRUCT_LR = (1e-5, 5e-5), (4e-6, 1e-5)  # peaks that usually do; an instruct model takes 2 to 5 times less
USUAL_REPLAY, USUAL_WARMUP = 0.2, 0.01  # shares of tokens
MOST_PASSES = 4.0  # Olmix, arXiv 2602.12237
FLAT = 0.01  # a bucket whose change is smaller has not moved
WATCHED = ("general", "behaviour", "safety")  # buckets that should not go down


@dataclass(frozen=True)
class Evidence:
    """A run's own numbers at a look.

    Attributes:
        peak_lr: in effect: of the schedule, times what gates and guard have made of it.
        warmup_share: of the run's tokens.
        has_template: whether the start has a chat template, by which it is taken for an instruct model.
        replay_share: of the tokens so far; None where no source is replay.
        passes: over each source.
        odd_rows: found by row checks; None where these are off.
        fill: share of the rows' room that tokens take, by source; ``split`` that of documents in more than one row.
        grad_norm, usual_norm: of the last step, and the median of the last ones; None before any.
        refused: updates.
        kl: KL(base || now), nats a token, by probe.
        healthy_step: the last that a gate would go back to, with a checkpoint; None where there is none.
        run_dir, tokens, budget: to say how to reproduce it.
    """

    peak_lr: float
    warmup_share: float
    has_template: bool
    replay_share: float | None
    passes: Mapping[str, float]
    odd_rows: int | None
    fill: Mapping[str, float]
    split: Mapping[str, float]
    grad_norm: float | None
    usual_norm: float | None
    refused: int
    kl: Mapping[str, float]
    healthy_step: int | None
    run_dir: str
    tokens: int
    budget: int


def debugging_order(found: Evidence) -> list[str]:
    """One line each, the likeliest cause first; of a model that nothing was trained on there is only how far it has moved."""
    parts = (_rate, _replay, _data, _packing, _batches, _drift, _smaller_run) if found.budget else (_drift,)
    return [f"({number}) {part(found)}" for number, part in enumerate(parts, 1)]


def harmed_buckets(rules: Iterable[str]) -> set[str]:
    """The buckets that rules are about; none for a rule of the user's own."""
    of_general = {PERPLEXITY, "answers"}
    return {"general" if rule in of_general else rule for rule in rules if rule in of_general | {*WATCHED}}


def stage_reading(changes: Mapping[str, Mapping], harmed: Collection[str] = ()) -> str:
    """What the buckets say of the stage, as ``gates.changes`` measures them: whether to go on, and what to look at.

    ``harmed``: buckets in which a gate has found harm, however unsure the change of the whole bucket is.
    """
    moved = {bucket: "down" if bucket in harmed else _moved(changes.get(bucket)) for bucket in ("domain", *WATCHED)}
    domain, general, behaviour, safety = moved.values()
    if general == "down":
        return "general is down: forgetting; the mixture and the rate come first"
    if behaviour == "down":
        return (
            "behaviour is down and general is not: instruct forgetting; look at the start (CPT on the base, then instruct "
            "again), at reattaching the chat vector, and at instruction-shaped replay"
        )
    if safety == "down":
        return "safety is down and general is not: look at replay that refuses, and at the start as for behaviour"
    if domain is None:
        return "the domain is not measured: nothing tells what the run was for"
    unsure = [bucket for bucket, how in moved.items() if how == "unsure"]
    if unsure:
        return f"{', '.join(unsure)} cannot be told from so few texts and items: give more (eval.sets, gates.suite)"
    if domain == "up":
        unknown = [bucket for bucket in WATCHED if moved[bucket] is None]
        missing = f" ({', '.join(unknown)} not measured)" if unknown else ""
        return f"the domain is up and nothing else is down{missing}: go on to the next stage"
    return (
        "nothing has moved: CPT has taught nothing yet; look at the size, the quality and the duplicates of the corpus"
    )


def _moved(change: Mapping | None) -> str | None:
    if change is None:
        return None
    gain, low, high = (change[name] for name in ("gain", "low", "high"))
    if gain is None or not math.isfinite(gain):
        return "down"
    if abs(gain) < FLAT:
        return "flat"
    certain = low is None or high is None or low > 0 or high < 0
    return ("up" if gain > 0 else "down") if certain else "unsure"


def _rate(found: Evidence) -> str:
    least, most = INSTRUCT_LR if found.has_template else BASE_LR
    kind = "an instruct model, by its chat template" if found.has_template else "a base model: it has no chat template"
    verdict = "above" if found.peak_lr > most else "below" if found.peak_lr < least else "within"
    return (
        f"learning rate: peak {found.peak_lr:.3g} is {verdict} {least:g} to {most:g}, which is usual from {kind}; "
        f"warm-up over {found.warmup_share:.2%} of the run ({USUAL_WARMUP:.0%} is usual)"
    )


def _replay(found: Evidence) -> str:
    if found.replay_share is None:
        return "replay: there is no replay source, so what the model knew gets no gradient; 20% is usual"
    return (
        f"replay: {found.replay_share:.1%} of the tokens so far ({USUAL_REPLAY:.0%} is usual, 25% for a new language)"
    )


def _data(found: Evidence) -> str:
    odd = (
        "row checks are off (data.row_checks.action=log)" if found.odd_rows is None else f"{found.odd_rows:,} odd rows"
    )
    often = [f"{name} {passes:.1f} times" for name, passes in found.passes.items() if passes > MOST_PASSES]
    read = f"; read more than {MOST_PASSES:g} times: {', '.join(often)}" if often else ""
    return f"data: {odd}{read}; look for duplicates, templates, mislabelled text"


def _packing(found: Evidence) -> str:
    parts = [
        f"{name} {fill:.2%} filled, {found.split[name]:.1%} of documents split" for name, fill in found.fill.items()
    ]
    return f"packing: {'; '.join(parts) or 'no source'}"


def _batches(found: Evidence) -> str:
    norm = "no step yet" if found.grad_norm is None or not found.usual_norm else (
        f"gradient norm {found.grad_norm:.3g}, {found.grad_norm / found.usual_norm:.2f} of the usual"
    )  # fmt: skip
    return f"batches: {norm}; {found.refused} updates refused so far"


def _drift(found: Evidence) -> str:
    if not found.kl:
        return "drift: not measured; a probe of kind drift tells how far the model has moved from its base"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in found.kl.items())
    return f"drift: KL(base || now) in nats a token: {parts}; a lower rate and more replay hold it back"


def _smaller_run(found: Evidence) -> str:
    back = "none is left that no gate objected to" if found.healthy_step is None else f"step {found.healthy_step}"
    less = max(1, min(found.tokens, found.budget // 10))
    words = f"train.tokens={less} schedule.warmup_tokens={less // 100} run.dir={found.run_dir}_less"
    return f"go back ({back}) and reproduce it with less, from the same start: {words}"


def lines_of(found: Evidence, changes: Mapping[str, Mapping], harmed: Collection[str]) -> Iterator[str]:
    """All that is printed when a gate finds harm in such buckets."""
    yield f"what the look says: {stage_reading(changes, harmed)}"
    yield "what to look at, the likeliest first:"
    yield from debugging_order(found)

"""Steps that stand out, and what is done about them. Pure: numbers of a step and what came before in, a finding out.

A step is judged before its update, on the mean loss and the gradient norm of the whole batch, both as logarithms. Each is
compared with the median of the last few steps, which follows a loss that falls. What it usually rises or falls by, and how
much that scatters, are the median and the median absolute deviation of these rises over a longer window, the latter scaled
to a normal distribution's standard deviation: the distance in these is a robust z-score (Iglewicz and Hoaglin 1993). Mean and
deviation, as in ZClip (arXiv 2504.02507), would be moved by the very outliers that are looked for. What is done is a ladder:
the gradient is scaled down, the update refused, the learning rate lowered, the run rolled back, and at last stopped.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from cpt_mega.config.schema import AnomalyOptions
from cpt_mega.errors import CheckpointError
from cpt_mega.json_types import Count, type_problem

NONE, CLIP, SKIP = "none", "clip", "skip"
LOWER, ROLL_BACK = "lower_lr", "roll_back"
MIN_STEPS = 16  # whose rises are known before deviations are; until then the factors below guard
MOST_LOSS, MOST_NORM = 2.0, 50.0  # times the usual so far, and the most so far
_TINY = 1e-30  # of which there is a logarithm
_LEVEL_STEPS = 16  # whose median is the level
_NORMAL = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
_LEAST_LOSS, _LEAST_NORM = 0.04, 0.1  # a deviation is not taken for smaller
_FAR, _LEAST_ROW = 5.0, 0.05  # of a row from the others of its batch, in their deviations; these as a share of the loss
# However much the loss scatters: a step this many times above the level is refused unless that is nothing unusual at all.
_SPIKE, _UNUSUAL = 2.0, 5.0


@dataclass
class AnomalyState:
    """What the guard knows of a run; a part of every checkpoint.

    Attributes:
        losses, norms: of the last steps whose update was made, oldest first; norms before clipping.
        loss_rises, norm_rises: of the last ``anomaly.window_steps`` of them, above the level before; logarithms.
        alarms: steps of this episode whose update was refused.
        flagged: rows of these steps that are to blame, by source.
        lr_scale: what the schedule's learning rate is multiplied by.
        calm_step: the step with which the episode ends and the rate is the schedule's own again, if no more is refused before.
        rollbacks: made so far.
        target, ended: the step that the last of them went back to, and the one that it came from.
        skipped_tokens: consumed, but of refused updates.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loss_rises: list[float] = field(default_factory=list)
    norm_rises: list[float] = field(default_factory=list)
    alarms: list[Count] = field(default_factory=list)
    flagged: dict[str, list[Count]] = field(default_factory=dict)
    lr_scale: float = 1.0
    calm_step: Count | None = None
    rollbacks: Count = 0
    target: Count | None = None
    ended: Count | None = None
    skipped_tokens: Count = 0

    def to_json(self) -> dict:
        """Plain values; ``from_json`` gives the same state back. Lists are shared, since none is changed in place."""
        return {**vars(self), "flagged": dict(self.flagged)}

    @classmethod
    def from_json(cls, values: dict) -> "AnomalyState":
        """Raises CheckpointError for values that ``to_json`` did not make; an empty one is a new run's."""
        problem = type_problem(values, cls)
        if problem is not None:
            raise CheckpointError("anomaly window", values, f"cannot be read ({problem}); use an older checkpoint")
        return cls(**copy.deepcopy(values))


@dataclass(frozen=True)
class Finding:
    """What the guard says of a step.

    Attributes:
        what: NONE, CLIP or SKIP.
        by_loss: whether it was the loss; otherwise the gradient alone, which does not say whose it was.
        why: a sentence's part; empty for NONE.
        most_norm: what the gradient norm is scaled down to; infinite where nothing is.
    """

    what: str = NONE
    why: str = ""
    by_loss: bool = True
    most_norm: float = math.inf


def judge(state: AnomalyState, options: AnomalyOptions, expected: float, loss: float, norm: float) -> Finding:
    """Compares a step with those before it.

    Args:
        expected: the most that the first losses of this model may be, as far as anything is known; nats.
        loss: mean over the batch's targets, nats.
        norm: of the gradient, before clipping.
    """
    if not math.isfinite(loss):
        return Finding(SKIP, f"loss is {loss}")
    finding = (
        _early(state, expected, loss, norm) if len(state.loss_rises) < MIN_STEPS else _late(state, options, loss, norm)
    )
    if not (math.isfinite(norm) or (finding.what == SKIP and finding.by_loss)):
        return Finding(SKIP, f"gradient norm is {norm}", by_loss=False)
    return finding


def _early(state: AnomalyState, expected: float, loss: float, norm: float) -> Finding:
    seen = len(state.losses)
    most = max(expected, MOST_LOSS * max(state.losses, default=0.0)) if seen < 4 else MOST_LOSS * _level(state.losses)
    if loss > most:
        return Finding(SKIP, f"loss {loss:.4g} is above {most:.4g}, the most for a first step")
    if state.norms and norm > MOST_NORM * max(state.norms):
        return Finding(SKIP, f"gradient norm {norm:.4g} is {MOST_NORM:g} times what any step before had", by_loss=False)
    return Finding()


def _late(state: AnomalyState, options: AnomalyOptions, loss: float, norm: float) -> Finding:
    usual, scatter = _scatter(state.loss_rises, _LEAST_LOSS)
    rise = _rise(state.losses, loss) - usual
    if rise > min(options.loss_z * scatter, max(math.log(_SPIKE), _UNUSUAL * scatter)):
        return Finding(SKIP, _words("loss", loss, state.losses, rise / scatter))
    usual, scatter = _scatter(state.norm_rises, _LEAST_NORM)
    rise = _rise(state.norms, norm) - usual
    words = _words("gradient norm", norm, state.norms, rise / scatter)
    if rise > options.skip_z * scatter:
        return Finding(SKIP, words, by_loss=False)
    if rise > options.clip_z * scatter:
        most = _level(state.norms) * math.exp(usual + options.clip_z * scatter)
        return Finding(CLIP, words, by_loss=False, most_norm=most)
    return Finding()


def _words(name: str, value: float, before: Sequence[float], z_score: float) -> str:
    return f"{name} {value:.4g} lies {z_score:.1f} deviations above the usual after {_level(before):.4g}"


def _level(before: Sequence[float]) -> float:
    return median(before[-_LEVEL_STEPS:])


def _rise(before: Sequence[float], value: float) -> float:
    """Above the level, as a logarithm."""
    return math.log(max(value, _TINY) / max(_level(before), _TINY))


def _scatter(rises: Sequence[float], least: float) -> tuple[float, float]:
    """The usual rise, and the deviation from it."""
    usual = median(rises)
    return usual, max(_NORMAL * median(abs(rise - usual) for rise in rises), least)


def first_losses(baseline: dict[str, float], vocab_size: int) -> float:
    """The most that a first loss may be: twice the worst step-0 reading, or what a model that knows nothing would have.

    Args:
        baseline: perplexity by bucket. Without the bucket ``domain`` it says nothing of what will be trained on.
    """
    known = [math.log(value) for value in baseline.values() if value > 1 and math.isfinite(value)]
    return MOST_LOSS * max(known) if known and "domain" in baseline else 1.5 * math.log(vocab_size)


def blamed(rows: Sequence[tuple[float, float]], usual: float | None) -> list[int]:
    """The rows of a batch whose loss stood out that are to blame, by their place in it; none where it was most of them.

    Args:
        rows: sum of losses (nats) and number of targets of each.
        usual: the loss of a usual batch, nats; None where nothing is known yet.

    A row is blamed that is not finite, or that lies far above the others of its batch and at least as far as the batch does
    above the usual: were all rows raised alike, it would be the model that has changed, and no row could be blamed.
    """
    means = {place: loss / targets for place, (loss, targets) in enumerate(rows) if targets}
    odd = [place for place, mean in means.items() if not math.isfinite(mean)]
    if means and not odd:
        middle = median(means.values())
        scatter = max(_NORMAL * median(abs(mean - middle) for mean in means.values()), _LEAST_ROW * middle)
        rise = sum(loss for loss, _ in rows) / sum(targets for _, targets in rows) - (
            middle if usual is None else usual
        )
        odd = [place for place, mean in means.items() if mean - middle >= max(_FAR * scatter, rise)]
    return odd if 2 * len(odd) <= len(means) else []


def accept(state: AnomalyState, options: AnomalyOptions, step: int, loss: float, norm: float) -> bool:
    """Takes the numbers of a step whose update is made; whether the learning rate is the schedule's own again with it."""
    if norm > 0:  # a batch without targets says nothing
        _observe(state, options, loss, norm)
    if state.calm_step is None or step < state.calm_step:
        return False
    was_lowered = state.lr_scale != 1.0
    state.lr_scale, state.calm_step, state.alarms, state.flagged = 1.0, None, [], {}
    return was_lowered


def _observe(state: AnomalyState, options: AnomalyOptions, loss: float, norm: float) -> None:
    if state.losses:
        state.loss_rises = [*state.loss_rises, _rise(state.losses, loss)][-options.window_steps :]
        state.norm_rises = [*state.norm_rises, _rise(state.norms, norm)][-options.window_steps :]
    state.losses, state.norms = [*state.losses, loss][-_LEVEL_STEPS:], [*state.norms, norm][-_LEVEL_STEPS:]


def expect_change(state: AnomalyState) -> None:
    """The run itself changes what it is trained on: until its scatter is known anew, only factors guard the loss."""
    state.loss_rises, state.norm_rises = [], []


def alarm(state: AnomalyState, options: AnomalyOptions, step: int, flagged: Iterable[tuple[str, int]]) -> str:
    """Takes a step whose update was refused; SKIP, LOWER or ROLL_BACK: how high on the ladder that is."""
    recent = [earlier for earlier in state.alarms if earlier > step - options.cool_down_steps]
    if not recent:
        state.flagged = {}
    state.alarms, state.calm_step = [*recent, step], step + options.cool_down_steps
    for source, row in flagged:
        state.flagged[source] = sorted({*state.flagged.get(source, ()), row})
    if len(state.alarms) >= options.roll_back_after:
        return ROLL_BACK
    if len(state.alarms) >= options.lower_lr_after:
        state.lr_scale *= options.lr_factor
        return LOWER
    return SKIP


def rolled_back(
    state: AnomalyState, number: int, target: int, ended: int, lr_scale: float, calm_step: int
) -> AnomalyState:
    """A checkpoint's own state as it is after the so-manieth rollback: with its window, no alarms, and a lowered rate."""
    taken = {"rollbacks": number, "target": target, "ended": ended, "calm_step": calm_step}
    return replace(state, **taken, lr_scale=min(state.lr_scale, lr_scale), alarms=[], flagged={})


def taken_back(state: AnomalyState, number: int, lr_scale: float, calm_step: int | None) -> AnomalyState:
    """A checkpoint's own state as it is after a rollback that was not the guard's: what the guard had lowered stays so."""
    kept = {"lr_scale": min(state.lr_scale, lr_scale), "calm_step": calm_step}
    return replace(state, rollbacks=number, alarms=[], flagged={}, **kept)


def rollback_target(state: AnomalyState, options: AnomalyOptions, steps: Iterable[int]) -> int | None:
    """The newest of the checkpoints at ``steps`` that is older than this episode; None where there is none.

    Where the last rollback was followed by another episode before the run had cooled down, it did not go back far enough: what
    spoilt the run was in that checkpoint already.
    """
    first = state.alarms[0]
    if state.target is not None and first <= state.ended + options.cool_down_steps:
        first = min(first, state.target)
    return max((step for step in steps if step < first), default=None)

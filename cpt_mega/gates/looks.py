"""When a run is evaluated, as a pure function of tokens: a resumed run looks where the uninterrupted one does."""

from cpt_mega.config.schedule import LearningRate
from cpt_mega.config.schema import Config

# In-context learning can collapse within the first hundreds of steps (arXiv 2506.00288), long before the first interval ends.
EARLIEST_SHARE = 0.005


def crossed(before: int, after: int, interval: int | None) -> bool:
    """Whether a multiple of ``interval`` lies in (before, after]; never without an interval."""
    return interval is not None and before // interval < after // interval


def early_looks(config: Config) -> tuple[int, ...]:
    """Tokens of the looks within the first interval: its halves down to 0.5 % of the run, so the first comes before 1 %."""
    interval, looks = config.eval.interval_tokens, []
    if interval is None or not config.eval.dense_start:
        return ()
    point = interval // 2
    while point >= max(1, EARLIEST_SHARE * config.train.tokens):
        looks.append(point)
        point //= 2
    return tuple(reversed(looks))


def ends_stable_phase(config: Config, before: int, after: int) -> bool:
    """Whether the step from ``before`` to ``after`` is the last before wsd's decay: the next could reach into it.

    Undecayed weights are often the better start for what follows (arXiv 2603.16127), so that checkpoint is never removed.
    """
    start = LearningRate.from_config(config).decay_start
    step = config.train.global_batch_size * config.train.seq_length  # of tokens, at most
    return start is not None and before + step <= start < after + step


def record_due(config: Config, before: int, after: int) -> bool:
    """Whether a checkpoint that stays on record falls into a step that leads from ``before`` tokens to ``after``."""
    return crossed(before, after, config.checkpoint.interval_tokens) or ends_stable_phase(config, before, after)


def look_due(config: Config, before: int, after: int) -> bool:
    """Whether a look falls into a step that leads from ``before`` tokens to ``after``; what stays on record has one."""
    early = any(before < point <= after for point in early_looks(config))
    return early or crossed(before, after, config.eval.interval_tokens) or record_due(config, before, after)

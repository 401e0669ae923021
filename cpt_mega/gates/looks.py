"""When a run is evaluated, as a pure function of tokens: a resumed run looks where the uninterrupted one does."""

import itertools
import math

from cpt_mega.config.schedule import LearningRate
from cpt_mega.config.schema import Config

# In-context learning can collapse within the first hundreds of steps (arXiv 2506.00288), long before the first interval ends.
EARLIEST_SHARE = 0.005
MANY = 10_000  # looks, that are counted one by one
_OF_TRAINING = 3  # tokens that are only read cost as much as one that is trained on
GROWTH = math.sqrt(2)  # of the tokens from one look to the next, where no interval is asked for


def crossed(before: int, after: int, interval: int | None) -> bool:
    """Whether a multiple of ``interval`` lies in (before, after]; never without an interval."""
    return interval is not None and before // interval < after // interval


def early_looks(config: Config) -> tuple[int, ...]:
    """Tokens of the looks within the first interval: its halves down to 0.5 % of the run, so the first comes before 1 %.

    With a suite and no interval the looks of the whole run: each at 1.4 times the tokens of the one before.
    """
    interval, looks = config.eval.interval_tokens, []
    if not config.eval.dense_start or (interval is None and config.gates.suite is None):
        return ()
    if interval is None:
        points = (int(config.train.tokens * GROWTH**-number) for number in itertools.count(1))
        first = max(1, EARLIEST_SHARE * config.train.tokens)
        return tuple(reversed(list(itertools.takewhile(lambda point: point >= first, points))))
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


def planned_looks(config: Config) -> int:
    """How many looks a run makes at most, the last one included; that of step 0 decides nothing.

    Exact where each falls into a step of its own: points are counted, and the steps are not. The last look before wsd's decay
    always counts as one more: the step that it falls into depends on the size of the steps, and items that are asked must not.
    """
    tokens, start = config.train.tokens, LearningRate.from_config(config).decay_start
    if not tokens:  # a model is judged as it is
        return 1
    intervals = [each for each in (config.eval.interval_tokens, config.checkpoint.interval_tokens) if each is not None]
    early = {point for point in early_looks(config) if point < tokens}
    others = 1 if start is None else 2  # the end, and that before the decay
    many = sum((tokens - 1) // interval for interval in intervals)
    if many > MANY:
        return len(early) + many + others
    return len(early.union(*(range(interval, tokens, interval) for interval in intervals))) + others


def look_tokens(config: Config) -> float:
    """Tokens that a look with a suite may read within ``gates.look_share``; infinite where nothing is trained, or none is set.

    A pure function of the configuration, so that the same items are asked whenever the run goes on: reading a token without a
    backward pass costs a third of training on it.
    """
    share, tokens = config.gates.look_share, config.train.tokens
    return math.inf if share is None or not tokens else share * tokens * _OF_TRAINING / (planned_looks(config) + 1)


def looks_share(config: Config, tokens: int) -> float:
    """What looks that read so many tokens cost of the computing of a run that trains, that of step 0 included."""
    return tokens * (planned_looks(config) + 1) / (_OF_TRAINING * config.train.tokens)

"""What rules see, and what they say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cpt_mega.json_types import finite

CONTINUE, WARN, ANNEAL, ROLL_BACK, STOP = "continue", "warn", "anneal", "roll_back", "stop"
ACTIONS = (CONTINUE, WARN, ANNEAL, ROLL_BACK, STOP)  # the later, the stronger
NOT_JUDGED = "none"  # the action of a look that no rule says anything of
NONE, SOFT, HARD = "none", "soft", "hard"


@dataclass(frozen=True)
class Verdict:
    """What a rule says. ``level`` is none, soft or hard, ``action`` one of ``ACTIONS``; ``numbers`` is what it was taken on.

    ``doubtful``: it is too little to object, and too much for a run to go back to. It decides nothing, so no ledger has it.
    """

    rule: str
    level: str
    action: str
    reason: str
    numbers: dict = field(default_factory=dict)
    doubtful: bool = False

    def to_json(self) -> dict:
        """Plain values for the ledger; None for a number that JSON cannot hold."""
        values = {name: value for name, value in asdict(self).items() if name != "doubtful"}
        return values | {"numbers": _plain(self.numbers)}


@dataclass(frozen=True)
class LookScores:
    """What rules see of a look.

    Attributes:
        tokens: of the run so far.
        baseline, perplexity: by bucket, at step 0 and now.
        since: tokens of the run at which a bucket's baseline was taken, where that was not step 0.
        before, now: score of each item by probe and id, at step 0 and now; higher is better, NaN of a model that is lost.
    """

    step: int
    tokens: int
    baseline: Mapping[str, float]
    perplexity: Mapping[str, float]
    before: Mapping[str, Mapping[str, float]]
    now: Mapping[str, Mapping[str, float]]
    since: Mapping[str, int] = field(default_factory=dict)


def strongest(verdicts: Sequence[Verdict]) -> str:
    """The action that is taken; CONTINUE where no rule says anything."""
    return max((verdict.action for verdict in verdicts), key=ACTIONS.index, default=CONTINUE)


def outcome(verdicts: Sequence[Verdict]) -> dict:
    """Of a look, as later ones see it: ``action``, ``objections`` (levels by rule), ``doubtful`` (rules that found it so)."""
    objections = {verdict.rule: verdict.level for verdict in verdicts if verdict.level != NONE}
    doubtful = [verdict.rule for verdict in verdicts if verdict.doubtful]
    found = {"action": strongest(verdicts) if verdicts else NOT_JUDGED, "objections": objections}
    return found | ({"doubtful": doubtful} if doubtful else {})


def trailing(found: Iterable[bool]) -> int:
    """How many at the end are true."""
    count = 0
    for one in found:
        count = count + 1 if one else 0
    return count


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return finite(value) if isinstance(value, float) else value

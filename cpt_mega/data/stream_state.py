"""What a sample stream has drawn so far: a cursor and a token ledger per source, and the mixture that is in effect."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Annotated

from cpt_mega.data.mixture import Mixture
from cpt_mega.errors import InputError
from cpt_mega.json_types import Count, Range, type_problem


@dataclass
class SourceState:
    """One source.

    Attributes:
        rows_taken: the cursor; it counts on through the epochs, and rows that are excluded with the others.
        tokens: taken, and counting for the loss: padding does not, nor what a loss mask leaves out.
        tokens_before: those of them taken before the mixture now in effect.
        owed: tokens that were due and not taken then, less than a row; negative for what was taken ahead. Without them a source
            with a small share would never be drawn when the mixture changes often.
    """

    rows_taken: int = 0
    tokens: int = 0
    tokens_before: int = 0
    owed: float = 0.0

    @property
    def tokens_under_mixture(self) -> float:
        """Tokens taken since the mixture took effect, less what was owed then: what shares are measured on."""
        return self.tokens - self.tokens_before - self.owed

    def take(self, tokens: int) -> None:
        """Counts one row, and those of its tokens that count for the loss."""
        self.rows_taken += 1
        self.tokens += tokens


@dataclass
class StreamState:
    """The whole stream.

    Shares are measured from where the mixture took effect. Measured from the start of the run, a change late in
    a long run would be followed by a long stretch of the raised source alone.

    Attributes:
        sources: every source ever drawn from, by name.
        configured: the mixture as the user asked for it; another one that is asked for takes effect at once.
        in_effect: that one, or what was decided since: by a gate, by the losses, or because a source had given all.
        since: tokens of the run, of all sources, when it took effect.
        excluded: rows of each source that are stepped past, ascending.
        dropped: sources that were in the mixture and have given all they may.
        raised: share of the tokens that replay sources have together beyond what is configured.
    """

    sources: dict[str, SourceState] = field(default_factory=dict)
    configured: Mixture | None = None
    in_effect: Mixture | None = None
    since: int = 0
    excluded: dict[str, list[int]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    raised: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens taken from all sources since the run began."""
        return sum(source.tokens for source in self.sources.values())

    def copy(self) -> "StreamState":
        """A state that does not change with this one."""
        return deepcopy(self)

    def under(self, configured: Mixture, row_tokens: int) -> "StreamState":
        """A copy under what a configuration asks for; sources it did not know start at 0, others keep cursor and ledger."""
        if configured == self.configured:
            return self.copy()
        state = self.copy()
        for name in configured.names:
            state.sources.setdefault(name, SourceState())
        state.enter(configured, row_tokens)
        state.configured, state.dropped, state.raised = configured, [], 0.0
        return state

    def enter(self, mixture: Mixture, row_tokens: int) -> None:
        """Lets a mixture take effect from here on; what sources lag or lead, a row at most, they keep."""
        now, before = self.tokens, self.in_effect
        for name, source in self.sources.items():
            owed = 0.0
            if before is not None and name in before.names:
                due = before.entitled(before.names.index(name), self.since, now)
                owed = min(max(due - source.tokens_under_mixture, -row_tokens), row_tokens)
            source.owed, source.tokens_before = owed, source.tokens
        self.in_effect, self.since = mixture, now

    def to_json(self) -> dict:
        """Plain values for JSON; ``from_json`` gives the same state back."""
        mixtures = {"configured": self.configured, "in_effect": self.in_effect}
        return {
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            **{name: mixture and mixture.to_json() for name, mixture in mixtures.items()},
            "since": self.since,
            "excluded": {name: list(rows) for name, rows in self.excluded.items()},
            "dropped": list(self.dropped),
            "raised": self.raised,
        }

    @classmethod
    def from_json(cls, value: dict) -> "StreamState":
        """Raises InputError when the value is not what ``to_json`` makes."""
        try:
            return cls(
                sources={str(name): _source(counts) for name, counts in value["sources"].items()},
                **{name: value[name] and Mixture.from_json(value[name]) for name in ("configured", "in_effect")},
                **_counts({"since": value["since"]}),
                excluded={
                    str(name): sorted(_counts(dict(enumerate(rows))).values())
                    for name, rows in value["excluded"].items()
                },
                dropped=list(map(str, value["dropped"])),
                raised=_share(value.get("raised", 0.0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            fix = f"not a saved data state ({error!r}); restore from another checkpoint"
            raise InputError("data state", value, fix) from error


def _source(counts: dict) -> SourceState:
    owed = counts.get("owed", 0.0)
    if type_problem(owed, Annotated[float, Range(-(2**53), 2**53)]):
        raise ValueError(f"owed is {owed!r}")
    return SourceState(**_counts({name: count for name, count in counts.items() if name != "owed"}), owed=float(owed))


def _share(value: float) -> float:
    if type_problem(value, Annotated[float, Range(0, 1)]):
        raise ValueError(f"raised is {value!r}")
    return float(value)


def _counts(counts: dict) -> dict:
    for name, count in counts.items():
        if type_problem(count, Count):
            raise ValueError(f"{name} is {count!r}")
    return counts

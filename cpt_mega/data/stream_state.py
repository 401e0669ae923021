"""What a sample stream has drawn so far: a cursor and a token ledger per source."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field

from cpt_mega.errors import InputError


@dataclass
class SourceState:
    """One source.

    Attributes:
        rows_taken: the cursor; it counts on through the epochs.
        tokens: real tokens taken.
        tokens_before: those of them taken before the current weights took effect.
    """

    rows_taken: int = 0
    tokens: int = 0
    tokens_before: int = 0

    @property
    def tokens_under_weights(self) -> int:
        """Real tokens taken since the current weights took effect: what their shares are measured on."""
        return self.tokens - self.tokens_before

    def take(self, tokens: int) -> None:
        """Counts one row."""
        self.rows_taken += 1
        self.tokens += tokens


@dataclass
class StreamState:
    """The whole stream: every source ever drawn from by name, and the normalised weights now in effect.

    Shares are measured from the moment the weights took effect. Measured from the start of the run, a change late in
    a long run would be followed by a long stretch of the raised source alone.
    """

    sources: dict[str, SourceState] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def copy(self) -> "StreamState":
        """A state that does not change with this one."""
        return deepcopy(self)

    def under(self, weights: dict[str, float]) -> "StreamState":
        """A copy with these weights in effect; sources it did not know start at 0, others keep cursor and ledger."""
        state = self.copy()
        for name in weights:
            state.sources.setdefault(name, SourceState())
        if weights != state.weights:
            state.weights = dict(weights)
            for source in state.sources.values():
                source.tokens_before = source.tokens
        return state

    def to_json(self) -> dict:
        """Plain values for JSON; ``from_json`` gives the same state back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "StreamState":
        """Raises InputError when the value is not what ``to_json`` makes."""
        try:
            sources = {str(name): SourceState(**_counts(counts)) for name, counts in value["sources"].items()}
            weights = {str(name): float(weight) for name, weight in value["weights"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fix = f"not a saved data state ({error!r}); restore from another checkpoint"
            raise InputError("data state", value, fix) from error
        return cls(sources, weights)


def _counts(counts: dict) -> dict[str, int]:
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}")
    return counts

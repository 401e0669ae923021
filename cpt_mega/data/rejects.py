"""Documents that did not make it into a corpus: why, and where they stand, so that none is lost silently."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

EXCERPT_CHARACTERS = 400
SHOWN = 10
EMPTY, BINARY = "empty", "binary"
HARMLESS = {EMPTY, BINARY}  # no text is lost with such a document, so it does not count as a fault of the input


@dataclass(frozen=True)
class Reject:
    """One document left out: its file, its line there (from 1), the reason, and the beginning of the line."""

    path: str
    line: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without the parser's own detail, which is what stands after a colon."""
        return self.reason.split(":")[0]


class RejectCounts:
    """How many were rejected, by kind, and the first few."""

    def __init__(self):
        self.by_kind: Counter[str] = Counter()
        self.first: list[Reject] = []
        self.first_faults: list[Reject] = []

    def add(self, reject: Reject) -> None:
        """Counts one."""
        self.by_kind[reject.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(reject)
        if reject.kind not in HARMLESS and len(self.first_faults) < SHOWN:
            self.first_faults.append(reject)

    @property
    def total(self) -> int:
        """All that were left out."""
        return self.by_kind.total()

    @property
    def harmless(self) -> int:
        """Those with which no text was lost."""
        return sum(self.by_kind[kind] for kind in HARMLESS)


def rejects_path(prefix: str) -> Path:
    """``PREFIX.rejects.jsonl``."""
    return Path(f"{prefix}.rejects.jsonl")


def reject_line(reject: Reject) -> bytes:
    """A line of the file."""
    return orjson.dumps(asdict(reject), option=orjson.OPT_APPEND_NEWLINE)

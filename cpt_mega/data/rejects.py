"""Documents that did not make it into a corpus: why, and where they stand, so that none is lost silently."""

import contextlib
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

EXCERPT_CHARACTERS = 400
SHOWN = 10


@dataclass(frozen=True)
class Reject:
    """One document left out: its file, its line there (from 1), the reason, and the beginning of the line."""

    path: str
    line: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RejectLog:
    """Writes ``PREFIX.rejects.jsonl`` at the end of a ``with`` block if there were any; removes an old one if not.

    On an error nothing is written and nothing is removed. Only the first few are held in memory.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.path = Path(f"{prefix}.rejects.jsonl")
        self.by_reason: Counter[str] = Counter()
        self.first: list[Reject] = []

    @property
    def count(self) -> int:
        """Rejects so far."""
        return self.by_reason.total()

    def add(self, reject: Reject) -> None:
        """Records one document."""
        # the part after a colon is the parser's own detail
        self.by_reason[reject.reason.split(":")[0]] += 1
        if len(self.first) < SHOWN:
            self.first.append(reject)
        self._stream.write(orjson.dumps(asdict(reject), option=orjson.OPT_APPEND_NEWLINE))

    def __enter__(self) -> "RejectLog":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        name = f".{self.path.name}."
        self._stream = tempfile.NamedTemporaryFile("wb", dir=self.path.parent, prefix=name, delete=False)
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: object) -> None:
        self._stream.close()
        if error_type is None and self.count:
            os.chmod(self._stream.name, 0o644)
            os.replace(self._stream.name, self.path)
        elif error_type is None:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._stream.name)

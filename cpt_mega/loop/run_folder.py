"""The run folder: status, metrics, ledger, and the files a user touches to steer a run.

Only the main process writes. ``metrics.jsonl`` holds one line a step and one a reading, ``items.jsonl`` one an item of each
evaluation, ``ledger.jsonl`` one a decision.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypedDict

from cpt_mega.errors import ExitCode, FaultError
from cpt_mega.json_types import Count, type_problem
from cpt_mega.lineage import parse_json, read_json, write_json
from cpt_mega.loop.lease import Lease, LeaseHeld

STATUS = "status.json"
METRICS = "metrics.jsonl"
ITEMS = "items.jsonl"
LEDGER = "ledger.jsonl"
STOP, SAVE = "STOP", "SAVE"

STATE_CODES = {
    "finished": ExitCode.FINISHED,
    "preempted": ExitCode.PREEMPTED,
    "gate_stop": ExitCode.GATE_STOP,
    "fault": ExitCode.FAULT,
    "config_error": ExitCode.CONFIG_ERROR,
}


_OPENED: set[Path] = set()  # by this process


class _Status(TypedDict, total=False):
    state: str
    exit_code: int | None
    reason: str
    step: Count
    tokens: Count
    run_id: str
    next_command: str


class RunFolder:
    """Files of one run. Every process but the main one has ``writes`` false, and all calls do nothing there."""

    def __init__(self, path: str | Path, writes: bool):
        self.path, self._may_write = Path(path), writes
        self._metrics = self._lease = None

    @property
    def writes(self) -> bool:
        """Whether this process writes here: the main one does, until the folder is another run's."""
        return self._may_write and self.lost is None

    @property
    def lost(self) -> str | None:
        """Who has a folder that this process had claimed, as a part of a sentence; None as long as nobody else has."""
        return None if self._lease is None else self._lease.lost

    def claim(self) -> str | None:
        """Makes the folder this process' own until ``close``; why it cannot be, or None. May wait for a minute (lease.py)."""
        if not self.writes:
            return None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lease = Lease.take(self.path)
        except LeaseHeld as owner:
            return f"another run is writing here ({owner}); wait for it, or name another run.dir"
        except OSError as error:
            return f"cannot be written ({error.strerror}); name another"
        return None

    def renew_claim(self) -> None:
        """Renews the claim out of turn: ``lost`` then says what is so now, not what was so at the last heartbeat."""
        if self._lease is not None:
            self._lease.beat()

    def open(self, config_yaml: str, ranks: list[dict] | None, sources: list[dict], step: int | None) -> None:
        """Makes the folder, writes config.yaml, ranks.json and sources.json, and drops the metrics of what will be done again.

        Args:
            config_yaml: the resolved configuration.
            ranks: one entry a process.
            sources: of the mixture, with how their documents fill rows.
            step: the restored step, whose lines and earlier ones are kept; None for a run that starts anew.

        The folder must have been claimed.
        """
        _OPENED.add(self.path.absolute())
        if not self.writes:
            return
        with _writing(self.path):
            (self.path / "config.yaml").write_text(config_yaml)
            write_json(self.path / "ranks.json", ranks)
            write_json(self.path / "sources.json", sources)
            if self._metrics is not None:
                self._metrics.close()
            drop_lines_after(self.path / METRICS, -1 if step is None else step)
            self._metrics = open(self.path / METRICS, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def status(self, state: str, reason: str, step: int, tokens: int, run_id: str, next_command: str) -> None:
        """Writes ``status.json``; ``exit_code`` is null while the run is running."""
        if not self.writes:
            return
        code = STATE_CODES.get(state)
        status = {
            "state": state,
            "exit_code": None if code is None else int(code),
            "reason": reason,
            "step": step,
            "tokens": tokens,
            "run_id": run_id,
            "next_command": next_command,
        }
        with _writing(self.path / STATUS):
            write_json(self.path / STATUS, status)

    def metric(self, line: dict) -> None:
        """Appends a line to ``metrics.jsonl``."""
        if self._metrics is not None and self.writes:
            with _writing(self.path / METRICS):
                self._metrics.write(json.dumps(line) + "\n")

    def items(self, lines: Iterable[dict]) -> list[int] | None:
        """Appends the scores of a look's items to ``items.jsonl``; the bytes of the file that have them, first and behind the
        last. They are on disk then, and stay: what the ledger says was decided on them."""
        if not self.writes:
            return None
        with _writing(self.path / ITEMS), open(self.path / ITEMS, "a+b") as stream:
            _end_line(stream)
            start = stream.tell()
            stream.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
            return [start, stream.tell()]

    def decide(self, line: dict) -> None:
        """Appends a decision to ``ledger.jsonl``, on disk before the run acts on it."""
        if not self.writes:
            return
        with _writing(self.path / LEDGER), open(self.path / LEDGER, "a+b") as stream:
            _end_line(stream)
            stream.write(json.dumps({"time_s": round(time.time(), 3), **line}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def asked(self, name: str) -> bool:
        """Whether a user touched a file such as STOP."""
        return self.writes and (self.path / name).exists()

    def answered(self, name: str) -> None:
        """Removes such a file once it was obeyed."""
        if self.writes:
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the metrics and gives the folder up."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a line that could not be written was told of
                self._metrics.close()
        if self._lease is not None:
            self._lease.release()


def _end_line(stream: BinaryIO) -> None:
    """A process may have been killed within the last line of a file."""
    stream.seek(0, os.SEEK_END)
    if stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
        stream.write(b"\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises FaultError for what cannot be written: a run whose record has holes does not go on as if nothing were."""
    try:
        yield
    except OSError as error:
        fix = "the last checkpoint is intact: mend that, then the same command goes on"
        raise FaultError(f"{path} cannot be written ({error.strerror}); {fix}") from error


def read_status(run_dir: str | Path) -> dict | None:
    """``status.json`` of a run folder, or None where there is none that can be read and is one."""
    with contextlib.suppress(OSError, ValueError):
        status = read_json(Path(run_dir) / STATUS)
        if isinstance(status, dict):  # that of a newer version may hold more
            known = {name: status[name] for name in _Status.__annotations__ if name in status}
            return status if type_problem(known, _Status) is None else None
    return None


def ended_since(run_dir: str | Path, moment: float) -> bool:
    """Whether some process has recorded an end of the run after ``moment`` (seconds since the epoch)."""
    status = read_status(run_dir)
    if status is None or status.get("state") == "running":
        return False
    return (Path(run_dir) / STATUS).stat().st_mtime >= moment


def opened_here(run_dir: str | Path) -> bool:
    """Whether this process has opened a run folder, to write in it or beside the one that does."""
    return Path(run_dir).absolute() in _OPENED


def read_lines(path: Path) -> list[dict]:
    """All that ``each_line`` yields."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict]:
    """The JSON objects of a file of lines, none when there is no file.

    A line that was cut by a crash or is damaged is passed over, and so is one whose step is no number.
    """
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            value = None
            with contextlib.suppress(ValueError):
                value = parse_json(line)
            if isinstance(value, dict) and type_problem(value.get("step", 0), Count) is None:
                yield value


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of steps up to ``step``; a line cut by a crash goes too."""
    if not path.is_file():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line.get("step", math.inf) <= step]
    building = path.with_suffix(".building")
    building.write_text("".join(kept))
    os.replace(building, path)

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from cpt_mega.data.encode import EncodedBatch
from cpt_mega.data.parts import Joiner, PartFolder
from cpt_mega.data.readers import Batch, Fields
from cpt_mega.data.workers import UnitEncoder, make_parts
from cpt_mega.errors import InputError


class Unit:
    """A unit whose documents are its number; ``during`` is called while it is read."""

    def __init__(self, number, during=lambda: None):
        self.number, self.during = number, during

    def read(self, fields):
        self.during()
        yield Batch([], self.number, 10)

    def digest(self):
        return f"{self.number:064d}"


def encode(batch):
    tokens = np.full(3, batch.lines, np.int32)
    return EncodedBatch(tokens, np.array([3]), None, [], 3, [], batch.lines, batch.input_bytes)


def work_on(folder, units):
    return UnitEncoder(encode, Fields(), folder, units, lambda part: units[part].digest())


@pytest.fixture
def folder(tmp_path):
    with PartFolder(str(tmp_path / "c"), "recipe", np.dtype(np.int32), False, False) as opened:
        yield opened


@pytest.mark.parametrize("workers", [1, 3])
def test_every_part_is_made_once_and_progress_is_told(folder, workers):
    seen = []
    made = list(
        make_parts(work_on(folder, list(map(Unit, range(20)))), range(20), workers, lambda *done: seen.append(done))
    )
    assert sorted(made) == list(range(20))
    assert seen[-1] == (200, 60)
    assert [folder.report(part).source_sha256 for part in (0, 19)] == [f"{0:064d}", f"{19:064d}"]


def test_a_slow_unit_does_not_hold_up_the_others(folder):
    units = [Unit(0, lambda: time.sleep(1.5)), *map(Unit, range(1, 12))]
    made = list(make_parts(work_on(folder, units), range(12), 2, lambda *_: None))
    assert made[-1] == 0 and sorted(made) == list(range(12))


def test_a_killed_worker_ends_the_work_with_the_reason(folder):
    units = [Unit(0), Unit(1, lambda: os.kill(os.getpid(), signal.SIGKILL)), Unit(2)]
    with pytest.raises(InputError, match="--workers = 2: a worker died.*memory.*run again to go on"):
        list(make_parts(work_on(folder, units), range(3), 2, lambda *_: None))


def test_an_error_of_a_worker_is_the_callers(folder):
    def fail():
        raise InputError("--input", "x", "cannot be unpacked")

    with pytest.raises(InputError, match="cannot be unpacked"):
        list(make_parts(work_on(folder, [Unit(0), Unit(1, fail)]), range(2), 2, lambda *_: None))


def test_workers_die_with_their_parent(tmp_path):
    """Otherwise they would write into a folder that another process has taken up."""
    script = f"""
        import os, sys, time
        sys.path.insert(0, {os.getcwd()!r})
        from tests.data.test_workers import *
        with PartFolder({str(tmp_path / "c")!r}, "recipe", np.dtype(np.int32), False, False) as folder:
            units = [Unit(n, lambda: (os.write(1, b"%d\\n" % os.getpid()), time.sleep(60))) for n in range(2)]
            list(make_parts(work_on(folder, units), range(2), 2, lambda *_: None))
    """
    words = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in state(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_what_is_left_is_joined_in_order_whatever_was_made_first(folder):
    work = work_on(folder, list(map(Unit, range(3))))
    with Joiner(folder, 3) as joiner:
        for part, joined in ((2, 0), (0, 1), (1, 3)):
            work(part)
            joiner.join_ready()
            assert len(joiner.reports) == joined
    tokens = np.fromfile(folder.joined_file("tokens"), np.int32)
    assert tokens[:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not tokens[9:].any()

"""The launcher around torchrun: signals reach the workers whenever they come, and nobody is killed while it obeys."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpt_mega import launch
from tests.helpers.slurm import until

ROOT = Path(__file__).resolve().parent.parent
WORKER = """
import os, signal, sys, time
from pathlib import Path

from cpt_mega.loop.signals import StopRequest

here, rank = Path(sys.argv[1]), os.environ["RANK"]
start_s, save_s, code = map(float, sys.argv[2:5])
(here / f"imports.{rank}").touch()
time.sleep(start_s)
if code < 0:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1000)
with StopRequest() as request:
    (here / f"listens.{rank}").touch()
    while request.name is None:
        time.sleep(0.01)
    time.sleep(save_s)
    (here / f"saved.{rank}").write_text(request.name)
sys.exit(int(code))
"""


@pytest.fixture
def launched(tmp_path):
    """``launched(start_s, save_s, code)``: two workers that import, listen, and save for so long when they are asked to end."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(start_s: float, save_s: float, code: int) -> subprocess.Popen:
        words = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"), str(tmp_path)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "cpt_mega.launch", *words, str(start_s), str(save_s), str(code)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for one in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            one.kill()
        process.kill()
        process.wait()


def _there(folder: Path, word: str) -> bool:
    return len(list(folder.glob(f"{word}.?"))) == 2


def _saved(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("saved.?"))]


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGTERM, "imports"), (signal.SIGINT, "listens")], ids=["importing", "running"]
)
def test_workers_are_asked_whatever_they_are_at(launched, tmp_path, number, moment):
    process = launched(1.0, 0.5, 75)
    until(lambda: _there(tmp_path, moment))
    os.killpg(process.pid, number)
    assert process.wait(60) == 1  # a worker's own code is in the file
    assert _saved(tmp_path) == [number.name] * 2


def test_a_run_that_was_just_ending_well_has_ended_well(launched, tmp_path):
    """As a signal during the last evaluation has it."""
    process = launched(0.0, 0.0, 0)
    until(lambda: _there(tmp_path, "listens"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and _saved(tmp_path) == ["SIGINT"] * 2


@pytest.mark.full
def test_a_save_of_a_minute_is_not_cut_short(launched, tmp_path):
    """torchrun itself would have ended it after 30 s."""
    process = launched(0.0, 60.0, 75)
    until(lambda: _there(tmp_path, "listens"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1 and _saved(tmp_path) == ["SIGTERM"] * 2


def test_a_second_interrupt_ends_what_cannot_obey(launched, tmp_path):
    process = launched(0.0, 0.0, -1)
    until(lambda: _there(tmp_path, "imports"))
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(launch.PATIENCE_S + 20) == 75
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)

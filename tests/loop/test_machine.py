"""What makes a machine unfit."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from cpt_mega.loop import machine
from cpt_mega.loop.machine import problems


@pytest.fixture(autouse=True)
def nothing_short(monkeypatch):
    """This machine may be short of something itself."""
    monkeypatch.setattr(machine, "LEAST_FREE", 0)
    monkeypatch.setattr(machine, "LEAST_MEMORY_SHARE", 0.0)
    monkeypatch.setenv("SLURMD_NODENAME", "here")


def test_a_machine_with_nothing_wrong_is_fit(tmp_path):
    assert problems(tmp_path, time.time()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("apart", [-300, 300])
def test_a_clock_that_is_elsewhere(tmp_path, apart):
    assert problems(tmp_path, time.time() - apart) == [f"its clock is {apart:+d} s from the job's"]


def test_a_folder_without_room_or_that_cannot_be_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(machine, "LEAST_FREE", 2**30)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(path)._replace(free=5 * 2**20))
    short = problems(tmp_path, time.time())
    assert len(short) == 2 and short[0] == f"the run folder {tmp_path} has 5 MiB free"
    assert "No such file or directory" in problems(tmp_path / "missing", time.time())[0]


@pytest.mark.parametrize(("name", "found"), [("here", True), ("elsewhere", False)])
def test_trainers_of_an_earlier_job(tmp_path, name, found):
    command = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "cpt_mega.train"]  # a shell would fork first
    left = subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": name}, start_new_session=True)
    try:
        expected = [f"trainers of an earlier job still run: pid {left.pid}"] if found else []
        assert problems(tmp_path, time.time()) == expected
    finally:
        os.killpg(left.pid, 9)


def test_memory_that_others_have(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LEAST_MEMORY_SHARE", 1.01)
    (words,) = problems(tmp_path, time.time())
    assert words.endswith("GiB of its memory are available")


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ('printf "0, 3\\n1, 40960\\n"', "GPU 1 has 40,960 MiB in use"),
        ('printf "0, 3\\n"', None),
        ("exit 9", "nvidia-smi does not answer (CalledProcessError)"),
        ("echo lost", "nvidia-smi does not answer (ValueError)"),
    ],
)
def test_devices_that_are_busy_or_do_not_answer(tmp_path, monkeypatch, says, words):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert problems(tmp_path, time.time()) == ([words] if words else [])

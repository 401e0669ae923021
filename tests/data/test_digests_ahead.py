import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpt_mega.data import digests_ahead
from cpt_mega.data.digests_ahead import DigestsAhead
from cpt_mega.data.preprocess import PreprocessOptions, preprocess
from cpt_mega.data.readers import JsonlRange
from tests.helpers.corpora import write_jsonl

ROOT = Path(__file__).resolve().parents[2]


class Unit:
    """A unit that writes down which process took its digest; ``during`` is called meanwhile."""

    input_bytes = digests_ahead.LEAST_BYTES

    def __init__(self, number, log, during=lambda: None):
        self.number, self.log, self.during = number, log, during

    def digest(self):
        with open(self.log, "a") as stream:
            stream.write(f"{self.number} {os.getpid() == self.of}\n")
        self.during()
        return f"{self.number:064d}"

    of = os.getpid()


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").touch()
    return tmp_path / "log"


def lines(log):
    return sorted(log.read_text().splitlines())


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_digest_is_taken_once_and_by_another_process(log, processes):
    units = [Unit(number, log) for number in range(10)]
    with DigestsAhead(units, processes) as digests:
        until(lambda: len(lines(log)) == 10)
        time.sleep(0.2)  # the last one is written down after it was logged
    assert [digests(part) for part in range(10)] == [unit.digest() for unit in units]
    assert [line for line in lines(log) if "False" in line] == [f"{number} False" for number in range(10)]
    assert len(lines(log)) == 20  # the ten of this process are the test's own


def test_what_was_not_taken_yet_is_taken_when_it_is_asked_for_and_nothing_is_waited_for(log):
    units = [Unit(number, log, (lambda: None) if number > 6 else (lambda: time.sleep(60))) for number in range(10)]
    begun = time.monotonic()
    with DigestsAhead(units, 1) as digests:
        until(lambda: "6 False" in lines(log))
    assert time.monotonic() - begun < 30
    for unit in units:
        unit.during = lambda: None
    assert [digests(part) for part in range(10)] == [f"{number:064d}" for number in range(10)]
    assert [line for line in lines(log) if "True" in line] == [f"{number} True" for number in range(7)]


def test_a_unit_that_cannot_be_read_is_left_to_whoever_reads_it(log):
    def gone():
        raise FileNotFoundError("gone")

    units = [Unit(0, log), Unit(1, log, gone)]
    with DigestsAhead(units, 1) as digests:
        until(lambda: len(lines(log)) == 2)
        time.sleep(0.2)
    assert digests(0) == f"{0:064d}"
    with pytest.raises(FileNotFoundError):
        digests(1)


@pytest.mark.parametrize(("processes", "input_bytes"), [(0, digests_ahead.LEAST_BYTES), (4, 1000)])
def test_one_worker_and_small_inputs_start_no_process(log, processes, input_bytes):
    unit = Unit(0, log)
    unit.input_bytes = input_bytes
    with DigestsAhead([unit], processes) as digests:
        time.sleep(0.3)
        assert not lines(log)
    assert digests(0) == f"{0:064d}" and lines(log) == ["0 True"]


def test_what_is_asked_for_in_the_block_is_taken_once(log):
    """As where a corpus is looked at, whether it is still of these inputs."""
    units = [Unit(number, log, lambda: time.sleep(0.05)) for number in range(20)]
    with DigestsAhead(units, 1) as digests:
        assert [digests(part) for part in range(20)] == [f"{number:064d}" for number in range(20)]
        time.sleep(0.2)
    taken = [line.split()[0] for line in lines(log)]
    assert len(taken) <= 21 and {*taken} == {*map(str, range(20))}  # the one in the middle perhaps by both
    assert any("False" in line for line in lines(log)) and any("True" in line for line in lines(log))


@pytest.mark.parametrize("how", ["well", "by an error"])
def test_no_process_is_left_behind_the_block(log, how):
    units = [Unit(number, log, lambda: time.sleep(60)) for number in range(3)]
    with contextlib.suppress(ValueError), DigestsAhead(units, 2) as digests:
        until(lambda: len(lines(log)) == 2)
        assert len(multiprocessing.active_children()) == 2
        if how != "well":
            raise ValueError
    assert not multiprocessing.active_children()
    units[1].during = lambda: None
    assert digests(1) == f"{1:064d}"


def test_where_no_process_can_be_started_all_is_done_here(log, monkeypatch):
    def refused(self):
        raise BlockingIOError("no room")

    monkeypatch.setattr(digests_ahead.CONTEXT.Process, "start", refused)
    with DigestsAhead([Unit(0, log)], 2) as digests:
        assert digests(0) == f"{0:064d}"
    assert lines(log) == ["0 True"]


def test_processes_end_with_the_one_that_started_them_and_not_by_ctrl_c(tmp_path):
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.data.test_digests_ahead import Unit
from cpt_mega.data.digests_ahead import DigestsAhead
units = [Unit(number, {str(tmp_path / "log")!r}, lambda: time.sleep(60)) for number in range(3)]
with DigestsAhead(units, 2) as digests:
    print(*(process.pid for process in digests._processes), flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    helpers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    until(lambda: (tmp_path / "log").exists() and len(lines(tmp_path / "log")) == 2)
    for helper in helpers:
        helper.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert len(helpers) == 2 and all(helper.is_running() for helper in helpers)
    process.kill()
    process.wait()
    until(lambda: not any(helper.is_running() and helper.status() != "zombie" for helper in helpers))


def test_half_a_digest_is_none(log):
    digests = DigestsAhead([Unit(0, log)], 0)
    assert digests(0) == f"{0:064d}" and digests(0) == f"{0:064d}" and lines(log) == ["0 True"]
    digests._table[3] = 7  # as a process leaves it that is killed while it writes
    assert digests(0) == f"{0:064d}" and lines(log) == ["0 True", "0 True"]


def test_a_corpus_has_the_same_manifest_whoever_took_the_digests(tmp_path, tokenizer_folder, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [f"number {number} " * 40 for number in range(12_000)])

    def made(name, least_bytes):
        monkeypatch.setattr(digests_ahead, "LEAST_BYTES", least_bytes)
        report = preprocess(PreprocessOptions((str(source),), str(tokenizer_folder), str(tmp_path / name), workers=2))
        return report.manifest

    ahead = made("ahead", 0)
    assert ahead == made("later", 1 << 40) and len(ahead.parts) > 3
    monkeypatch.setattr(JsonlRange, "digest", lambda unit: "0" * 64)  # what is told is what is written down
    assert {part["source_sha256"] for part in made("other", 0).parts} == {"0" * 64}

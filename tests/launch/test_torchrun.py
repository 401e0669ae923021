"""The launcher as a user has it: real processes, the trainer's own exit codes, signals."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.jobsite import assert_same_end, metrics, status
from tests.helpers.slow_saves import slow_saves
from tests.helpers.slurm import until

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = ROOT / "launch" / "torchrun.sh"
_STARTED: list[subprocess.Popen] = []


def _start(jobsite, run, *overrides, **environment: str) -> subprocess.Popen:
    command = ["bash", str(LAUNCHER), jobsite.config, f"run.dir={run}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, **environment}
    _STARTED.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes))
    return _STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Whatever a test met, none of its launches outlives it."""
    yield
    for process in _STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    _STARTED.clear()


def _finish(process, timeout_s: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
        return process.returncode, out, err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_steps(run, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len(metrics(run, "train")) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the run made no step")


def test_a_wrong_key_ends_with_2_and_one_line(jobsite, tmp_path):
    code, out, err = _finish(_start(jobsite, tmp_path / "run", "train.tokns=3"))
    assert code == 2
    assert err.splitlines() == ["error: train.tokns = 3: unknown key; did you mean 'tokens'?"]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_what_only_the_model_can_refuse_ends_with_2(jobsite, tmp_path):
    code, _, err = _finish(_start(jobsite, tmp_path / "run", "parallel.tp=4"))
    assert code == 2
    assert "parallel.tp = 4: must divide the model's 6 attention heads" in err
    assert "Traceback" not in err
    assert status(tmp_path / "run")["state"] == "config_error"


def test_an_unusable_run_folder_ends_with_2(jobsite, tmp_path):
    """Only 70 may be restarted, so a wrong path must not look like a fault."""
    (tmp_path / "file").write_text("")
    code, _, err = _finish(_start(jobsite, tmp_path / "file" / "run"))
    assert code == 2
    assert "run.dir" in err and "cannot be written" in err


def test_a_gate_stop_ends_with_80(jobsite, tmp_path):
    words = ["optimizer.lr=1.0", "gates.general_perplexity_limit=0.01", "eval.interval_tokens=250"]
    code, out, err = _finish(_start(jobsite, tmp_path / "run", *words))
    assert code == 80
    assert "general perplexity" in out and "exit code 80" in err and "Traceback" not in err


def test_a_signal_before_the_configuration_is_read_begins_nothing(jobsite, tmp_path):
    process = _start(jobsite, tmp_path / "run")
    until(lambda: psutil.Process(process.pid).children())
    process.send_signal(signal.SIGTERM)
    code, _, err = _finish(process)
    assert code == 75 and err == "ended with exit code 75 before the run began\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGINT, marks=pytest.mark.full, id="SIGINT")],
)
def test_a_signal_ends_with_75_and_the_same_command_goes_on(jobsite, tmp_path, number):
    """SIGTERM reaches the launcher alone; Ctrl-C reaches every process of the terminal's group."""
    run = tmp_path / "run"
    words = ["train.tokens=100_000", "parallel.tp=2", "parallel.sp=true", "eval.sets=[]", "restore.mode=weights"]
    process = _start(jobsite, run, *words)
    _wait_for_steps(run, 2)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    code, _, err = _finish(process)
    assert "Traceback" not in err
    ended = status(run)
    assert code == 75 == ended["exit_code"]
    assert ended["state"] == "preempted" and number.name in ended["reason"]
    assert (run / "checkpoints" / f"iter_{ended['step']:07d}" / "COMPLETE").is_file()
    left = f" train.tokens={ended['tokens'] + 300} restore.accept=[train.tokens]"
    again = subprocess.run(
        ended["next_command"] + left, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0 and status(run)["state"] == "finished"
    assert metrics(run, "train")[ended["step"]]["step"] == ended["step"] + 1


@pytest.mark.full
def test_a_save_of_a_minute_is_not_cut_short(jobsite, tmp_path):
    """torchrun itself ends its workers 30 s after a signal."""
    run = tmp_path / "run"
    words = ["train.tokens=100_000", "parallel.tp=2", "parallel.sp=true", "eval.sets=[]"]
    process = _start(jobsite, run, *words, **slow_saves(tmp_path / "slow", 60))
    _wait_for_steps(run, 2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = _finish(process, 240)
    assert code == 75 and "Traceback" not in err and time.monotonic() - asked > 60
    assert sorted(path.name for path in (tmp_path / "slow").glob("slept.*")) == ["slept.0", "slept.1"]
    ended = status(run)
    assert ended["state"] == "preempted" and (run / "checkpoints" / f"iter_{ended['step']:07d}" / "COMPLETE").is_file()


@pytest.mark.full
def test_two_machines_start_again_by_themselves(jobsite, tmp_path, workers):
    """A process of one is killed: torchrun on both starts all of them again, and the run ends bit for bit."""
    words = ["train.tokens=30_000", "eval.sets=[]", "checkpoint.interval_tokens=2_000", "parallel.tp=2"]
    workers(4).run("train", config=jobsite.config, overrides=[f"run.dir={tmp_path / 'through'}", *words])
    run = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    several = {"NNODES": "2", "NPROC": "2", "RDZV_ENDPOINT": endpoint, "MAX_RESTARTS": "1", "OMP_NUM_THREADS": "1"}
    machines = [_start(jobsite, run, *words, **several) for _ in range(2)]
    until(lambda: len(list((run / "checkpoints").glob("iter_*/COMPLETE"))) > 1)
    _trainers(machines[1])[-1].kill()
    ends = [_finish(machine, 300) for machine in machines]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert status(run)["state"] == "finished"
    restores = [line for line in (run / "ledger.jsonl").read_text().splitlines() if '"restore"' in line]
    assert len(restores) == 2
    assert_same_end(run, tmp_path / "through")


@pytest.mark.full
def test_a_run_whose_launcher_is_killed_ends_with_a_checkpoint(jobsite, tmp_path):
    """Nobody would start it again, nor hear a signal for it."""
    run = tmp_path / "run"
    process = _start(jobsite, run, "train.tokens=100_000", "eval.sets=[]")
    _wait_for_steps(run, 2)
    (trainer,) = _trainers(process)
    trainer.parent().kill()
    code, _, _ = _finish(process)
    until(lambda: not trainer.is_running())
    ended = status(run)
    assert ended["state"] == "preempted" and "SIGTERM" in ended["reason"] and code in (70, 75)
    assert (run / "checkpoints" / f"iter_{ended['step']:07d}" / "COMPLETE").is_file()


def _trainers(process: subprocess.Popen) -> list[psutil.Process]:
    """torchrun's own children."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in one.environ() and "RANK" not in one.parent().environ():
                found.append(one)
    return found


@pytest.mark.parametrize(
    ("gpus", "layout", "environment", "expected"),
    [
        (8, 16, {"NNODES": "2"}, 8),
        (8, 2, {}, 8),
        (0, 4, {"NNODES": "2"}, 2),
        (0, 3, {"NNODES": "2"}, None),
        (8, 16, {}, None),
        (8, 3, {}, None),
        (8, 16, {"NNODES": "2", "NPROC": "4"}, 4),
    ],
)
def test_a_machine_has_a_process_for_each_gpu_or_what_the_layout_needs(tmp_path, gpus, layout, environment, expected):
    """In a repository whose Python says what it was asked to start."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCHER, tmp_path / "launch")
    programs = {
        ".venv/bin/python": f'case "$*" in *--print-launch*) echo {layout} run ;; *) echo "$@" ;; esac',
        "bin/nvidia-smi": f"for gpu in $(seq {gpus}); do echo GPU; done",
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"RDZV_ENDPOINT": "m1:1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **environment}
    command = ["bash", str(tmp_path / "launch" / "torchrun.sh"), "c.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if expected is None:
        assert done.returncode == 2 and f"no multiple of the {layout} processes" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0 and f"--nproc-per-node {expected} " in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("changed", "code"), [("in this launch", 75), pytest.param("in an earlier one", 2, marks=pytest.mark.full)]
)
def test_what_torchrun_starts_again_ends_as_this_launch_did(jobsite, tmp_path, changed, code):
    """A run that was stopped stays so; one that was stopped some other day, and is lost now, goes on."""
    (tmp_path / "status.json").write_text('{"state": "preempted", "exit_code": 75}')
    if changed == "in an earlier one":
        os.utime(tmp_path / "status.json", (1, 1))
    words = ["--config", jobsite.config, f"run.dir={tmp_path}", "model.checkpoint=/nowhere"]  # going on, it is refused
    environment = {**os.environ, "TORCHELASTIC_RESTART_COUNT": "1"}
    done = subprocess.run([sys.executable, "-m", "cpt_mega.train", *words], cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == code

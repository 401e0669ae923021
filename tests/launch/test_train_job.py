"""launch/slurm/train.sbatch: how its job ends, and that a run goes on through whatever happens to it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.jobsite import assert_same_end, metrics, status
from tests.helpers.slow_saves import slow_saves
from tests.helpers.slurm import DONE, HELD, RealSlurm, SmallSlurm, may_have_namespaces, may_have_slurm, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
# Stands for the launcher of a repository: each start ends as the next line of `ends` says, STATE CODE STEP REASON.
LAUNCHER = """
mkdir -p "$LOG_DIR/$SLURMD_NODENAME"
echo "$*" > words
line=$(sed -n "$((SLURM_RESTART_COUNT + 1))p" ends)
read -r state code step reason <<<"$line"
while [ "$state" = preempted ] && [ "$reason" = asked ] && [ ! -e run/STOP ]; do touch waits; sleep 0.02; done
if [ "$SLURM_PROCID" = 0 ]; then # the first to end ends the others, so all wait for what it writes
  mkdir -p run/checkpoints
  echo "$step" > run/checkpoints/latest_checkpointed_iteration.txt
  status='{\\n "state": "%s",\\n "exit_code": %s,\\n "reason": "%s"\\n}\\n'
  [ "$state" = none ] || printf "$status" "$state" "$code" "$reason" > run/status.json
  touch "$LOG_DIR/told"
fi
while [ ! -e "$LOG_DIR/told" ]; do sleep 0.02; done
echo "$code" > "$LOG_DIR/$SLURMD_NODENAME/exit_code"
exit "$code"
"""
PYTHON = """#!/bin/sh
case "$*" in
  *--print-launch*) [ -e wrong ] && { echo "error: train.tokns" >&2; exit 2; }
    [ -e "broken-$SLURMD_NODENAME" ] && exit 127; echo "2 run" ;;
  *--together*) [ -e together ] && { touch waits; while [ -e together ]; do sleep 0.02; done; }
    echo "$SLURMD_NODENAME: fit, with others" ;;
  *check_node.py*) [ -e "unfit-$SLURMD_NODENAME" ] && echo "$SLURMD_NODENAME: not fit: full" || echo "$SLURMD_NODENAME: fit" ;;
esac
"""


@pytest.fixture
def site(tmp_path):
    """A repository that only seems to train: ``site(ends, machines, **environment)`` gives the Slurm that its job is in."""
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    (repository / "launch" / "torchrun.sh").write_text(LAUNCHER)
    (repository / "python").write_text(PYTHON)
    (repository / "python").chmod(0o755)
    slurms = []

    def submit(
        ends: list[str], *words, machines: int = 2, there: int = 3, cancelled=False, **environment
    ) -> SmallSlurm:
        (repository / "ends").write_text("\n".join(ends) + "\n")
        slurm = SmallSlurm(tmp_path / "slurm", there, cancelled=cancelled).__enter__()
        slurms.append(slurm)
        environment = {"PYTHON": "./python", "OMP_NUM_THREADS": "1", **environment}
        script, *words = words or (SCRIPT, "train.yaml")
        slurm.submit(script, *words, machines=machines, submit_from=repository, **environment)
        return slurm

    submit.repository = repository
    yield submit
    for slurm in slurms:
        slurm.__exit__()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("finished 0 9 target", 0),
        ("gate_stop 80 9 general perplexity", 80),
        ("config_error 2 0 train.tokens", 2),
        ("preempted 75 4 STOP was touched in the run folder", 75),
    ],
)
def test_what_ends_a_run_ends_its_job(site, end, code):
    slurm = site([end])
    assert slurm.wait() == (DONE, code), slurm.log()
    assert len(slurm.starts) == 1


def test_a_job_for_the_gates_alone_trains_nothing_and_ends_with_their_word(site):
    shutil.copytree(SCRIPT.parent, site.repository / "launch" / "slurm")
    gates = SCRIPT.with_name("gates.sbatch")
    slurm = site(["gate_stop 80 0 general perplexity"], gates, "train.yaml", "runs/a", "judged", "gates.x=1")
    assert slurm.wait() == (DONE, 80), slurm.log()
    words = (site.repository / "words").read_text().split()
    assert words[:3] == ["train.yaml", "model.checkpoint=runs/a", "run.dir=judged"]
    assert {"train.tokens=0", "restore.mode=weights"} < set(words) and words[-1] == "gates.x=1"
    done = subprocess.run(["bash", gates, "train.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and "CONFIG CHECKPOINT RUN_DIR" in done.stderr


def test_a_wrong_configuration_starts_nothing(site):
    (site.repository / "wrong").touch()
    slurm = site(["finished 0 9 target"])
    assert slurm.wait() == (DONE, 2) and "error: train.tokns" in slurm.log()
    assert not (site.repository / "run").exists()


def test_asked_to_end_it_asks_for_a_checkpoint_and_is_queued_again(site):
    slurm = site(["preempted 75 4 asked", "finished 0 9 target"])
    until(lambda: (site.repository / "waits").exists())
    slurm.signal(signal.SIGUSR1)
    assert slurm.wait() == (DONE, 0), slurm.log()
    assert [start["code"] for start in slurm.starts] == [75, 0]
    assert not (site.repository / "run" / "STOP").exists()


def test_asked_to_end_before_the_training_it_leaves_no_stop_behind(site):
    (site.repository / "together").touch()
    slurm = site(["finished 0 9 target"] * 2)
    until(lambda: (site.repository / "waits").exists())
    slurm.signal(signal.SIGUSR1)
    (site.repository / "together").unlink()
    assert slurm.wait() == (DONE, 0), slurm.log()
    assert len(slurm.starts) == 2 and not (site.repository / "run" / "STOP").exists()


@pytest.mark.parametrize(("content", "stays"), [("4711\n", False), ("", True)], ids=["this job's", "a user's"])
def test_a_stop_that_a_killed_start_left_is_not_obeyed_and_a_users_is(site, content, stays):
    (site.repository / "run").mkdir()
    (site.repository / "run" / "STOP").write_text(content)
    slurm = site(["finished 0 9 target"])
    assert slurm.wait() == (DONE, 0) and (site.repository / "run" / "STOP").exists() == stays


def test_a_job_that_was_cancelled_does_not_come_back(site):
    slurm = site(["preempted 75 4 received SIGTERM"], cancelled=True)
    assert slurm.wait() == (DONE, 75) and len(slurm.starts) == 1 and "Slurm ends the job" in slurm.log()


def test_a_wrong_configuration_of_a_run_that_had_begun_is_no_fault(site):
    """Its status is not touched then."""
    slurm = site(["none 2 5"])
    assert slurm.wait() == (DONE, 2) and len(slurm.starts) == 1, slurm.log()


def test_a_machine_that_cannot_even_read_the_configuration_is_excluded(site):
    (site.repository / "broken-m1").touch()
    slurm = site(["none 0 0", "finished 0 9 target"])
    assert slurm.wait() == (DONE, 0), slurm.log()
    assert [start["machines"] for start in slurm.starts] == [["m1", "m2"], ["m2", "m3"]]


def test_a_signal_of_slurm_to_the_processes_queues_the_job_again(site):
    slurm = site(["preempted 75 4 received SIGTERM", "finished 0 9 target"])
    assert slurm.wait() == (DONE, 0) and len(slurm.starts) == 2


def test_faults_without_a_new_checkpoint_are_counted_and_then_the_job_is_held(site):
    slurm = site(["fault 70 5 hang", "none 137 5", "fault 70 9 nan", "fault 70 9 nan", "running 1 9"])
    assert slurm.wait() == (HELD, 70), slurm.log()
    assert len(slurm.starts) == 5
    assert "fault 2 of 3 at step 5" in slurm.log() and "fault 3 of 3 at step 9" in slurm.log()
    assert "scontrol release 4711" in slurm.log()


def test_a_status_of_an_earlier_start_does_not_count(site):
    run = site.repository / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "finished"}')
    os.utime(run / "status.json", (1, 1))
    slurm = site(["none 1 0"], MAX_FAULTS="1")
    assert slurm.wait() == (HELD, 70) and "the run is not begun" in slurm.log()


def test_a_machine_that_is_not_fit_is_excluded(site):
    (site.repository / "unfit-m2").touch()
    slurm = site(["none 0 0", "finished 0 9 target"])
    assert slurm.wait() == (DONE, 0), slurm.log()
    assert [start["machines"] for start in slurm.starts] == [["m1", "m2"], ["m1", "m3"]]
    assert "m2: not fit: full" in slurm.log()


def test_when_no_machine_is_fit_it_is_not_theirs(site):
    for machine in ("m1", "m2"):
        (site.repository / f"unfit-{machine}").touch()
    slurm = site([], there=2, MAX_FAULTS="2")
    assert slurm.wait() == (HELD, 70) and len(slurm.starts) == 2 and "no machine is fit" in slurm.log()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (
            {"PYXIS_IMAGE": "image.sqsh", "MOUNTS": "/a:/a,/b:/b"},
            "--container-image=image.sqsh --container-workdir={} --container-mounts=/a:/a,/b:/b ",
        ),
        ({"APPTAINER_IMAGE": "image.sif", "MOUNTS": "/a:/a"}, "apptainer exec --nv --pwd {} --bind /a:/a image.sif "),
    ],
    ids=["pyxis", "apptainer"],
)
def test_all_that_runs_on_the_machines_runs_in_the_container(site, image, expected):
    slurm = site(["finished 0 9 target"], **image)
    assert slurm.wait() == (DONE, 0), slurm.log()
    steps = (slurm.folder / "srun.log").read_text().splitlines()
    assert len(steps) == 4 and all(expected.format(site.repository) in step for step in steps)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], {"SLURM_JOB_ID": "1"}, "no configuration"),
        (["train.yaml"], {}, "not a Slurm job"),
        (["train.yaml"], {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/"}, "is not the repository"),
    ],
)
def test_what_cannot_be_right_is_refused(words, environment, message):
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


KINDS = [
    pytest.param("small", id="processes", marks=pytest.mark.full),
    pytest.param("real", id="slurm", marks=pytest.mark.full),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_through_an_unfit_machine_and_the_end_of_its_time(workers, jobsite, tmp_path, kind):
    """Bit for bit the run that nothing happened to; the save at the end of its time takes a minute."""
    if kind == "real" and not may_have_slurm():
        pytest.skip("Slurm's daemons (munge, slurmctld, slurmd) are not installed, or this is not root")
    words = ["train.tokens=16_000", "eval.sets=[]"]
    workers(2).run("train", config=jobsite.config, overrides=[f"run.dir={tmp_path / 'through'}", *words])
    slurms = {"small": SmallSlurm, "real": RealSlurm}
    left = _leave_a_trainer_on("m1")
    run = tmp_path / "run"
    try:
        with slurms[kind](tmp_path / "slurm" / kind, machines=3) as slurm:
            environment = {"NPROC": "1", "OMP_NUM_THREADS": "1", **slow_saves(tmp_path / "slow", 60)}
            slurm.submit(SCRIPT, jobsite.config, f"run.dir={run}", *words, machines=2, **environment)
            until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run, "train")) > 2, slurm.log)
            asked = time.monotonic()
            slurm.signal(signal.SIGUSR1)
            assert slurm.wait(500) == (DONE, 0), slurm.log()
            assert time.monotonic() - asked > 60 and len([*(tmp_path / "slow").glob("slept.*")]) == 2
            log = slurm.log()
    finally:
        left.kill()
    assert f"m1: not fit: trainers of an earlier job still run: pid {left.pid}" in log
    assert "2 machines: m2,m3" in log and "asked to end" in log and "the run is finished" in log
    assert status(run)["state"] == "finished"
    assert_same_end(run, tmp_path / "through")
    assert sorted(path.name for path in (run / "logs").glob("*.[12]/*") if path.is_dir()) == ["m2", "m2", "m3", "m3"]


@pytest.mark.full
def test_a_machine_that_is_lost_and_comes_back(workers, jobsite, tmp_path):
    """Two machines of two processes, each machine in a network namespace: tensor parallelism within, data across."""
    if not may_have_namespaces():
        pytest.skip("this process may not make network namespaces (iproute2, CAP_SYS_ADMIN)")
    words = [
        "train.tokens=30_000",
        "eval.sets=[]",
        "parallel.tp=2",
        "parallel.sp=true",
        "checkpoint.interval_tokens=4_000",
    ]
    workers(4).run("train", config=jobsite.config, overrides=[f"run.dir={tmp_path / 'through'}", *words])
    run = tmp_path / "run"
    with SmallSlurm(tmp_path / "slurm", machines=2, namespaces=True) as slurm:
        slurm.submit(
            SCRIPT,
            jobsite.config,
            f"run.dir={run}",
            *words,
            machines=2,
            NPROC="2",
            OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="eth0",
        )
        until(lambda: len(list((run / "checkpoints").glob("iter_*"))) > 1, slurm.log)
        slurm.lose("m2")
        assert slurm.wait() == (DONE, 0), slurm.log()
    assert [start["code"] for start in slurm.starts] == [75, 0] and "fault 1 of 3" in slurm.log()
    assert_same_end(run, tmp_path / "through")


def _leave_a_trainer_on(machine: str) -> subprocess.Popen:
    command = ["bash", "-c", "sleep 600; true", "-m", "cpt_mega.train"]
    return subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": machine})

"""Slurm for tests: a small one made of processes of this machine, and a real one where its daemons are installed.

Both have machines ``m1``, ``m2``, ... and the same doors: ``submit``, ``wait``, ``log``, ``signal``. The small one may
lose a machine, and have each in a network namespace of its own; it does what Slurm 22.05 was seen to do.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELD, DONE = "held", "done"
# Finds the command among the words as `apptainer exec` does: behind the image.
_CONTAINER = 'while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"'
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")


class SmallSlurm:
    """Really starts what a job script starts, a process for each task; a job that asks for it is queued again.

    Args:
        folder: for the job's files.
        machines: how many there are.
        namespaces: whether each is a network namespace of its own (see ``may_have_namespaces``).
        cancelled: whether Slurm is already ending the job, when it asks for its state.
    """

    def __init__(self, folder: Path, machines: int, namespaces: bool = False, cancelled: bool = False):
        self.folder, self.namespaces, self._cancelled = folder, namespaces, cancelled
        self.machines = [f"m{number}" for number in range(1, machines + 1)]
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        programs = {name: f'exec "{sys.executable}" "{Path(__file__)}" {name} "$@"' for name in ("srun", "scontrol")}
        for name, text in {**programs, "apptainer": _CONTAINER}.items():
            program = self._bin / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen | None = None
        self.starts: list[dict] = []

    def __enter__(self) -> "SmallSlurm":
        if self.namespaces:
            _make_namespaces(self.machines)
        return self

    def __exit__(self, *error) -> None:
        self._write(ended=True)
        if self._process is not None and self._process.poll() is None:
            _kill_session(self._process.pid)
        for machine in self.machines:
            self.lose(machine)
        if self._thread is not None:
            self._thread.join(30)
        if self.namespaces:
            _remove_namespaces(self.machines)

    def submit(self, script: Path, *words: str, machines: int, submit_from: Path = ROOT, **environment: str) -> None:
        """One job, at once."""
        copy = self.folder / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(script, copy)
        self._write(excluded=[], then=DONE, ended=False, shown="COMPLETING" if self._cancelled else "RUNNING")
        self._thread = threading.Thread(target=self._run, args=(copy, words, machines, submit_from, environment))
        self._thread.start()

    def wait(self, timeout_s: float = 240) -> tuple[str, int]:
        """``DONE`` or ``HELD``, and the exit code of the last start."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), self.log()
        return _read(self.folder)["then"], self.starts[-1]["code"]

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def signal(self, number: int) -> None:
        """To the job script alone, as ``--signal=B:`` has it."""
        self._process.send_signal(number)

    def lose(self, machine: str) -> None:
        """A machine ends: all that runs there, without a word."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if {f"SLURMD_NODENAME={machine}".encode(), f"SMALL_SLURM={self.folder}".encode()} <= {*variables}:
                    os.kill(int(entry.name), signal.SIGKILL)

    def _run(self, script: Path, words, machines: int, submit_from: Path, environment: dict) -> None:
        while True:
            there = [name for name in self.machines if name not in _read(self.folder)["excluded"]][:machines]
            assert len(there) == machines, "the job would wait for ever"
            self._write(then=DONE)
            slurm = {
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": ",".join(there),
                "SLURM_RESTART_COUNT": str(len(self.starts)),
                "SLURM_SUBMIT_DIR": str(submit_from),
                "SMALL_SLURM": str(self.folder),
                "SMALL_SLURM_NAMESPACES": "1" if self.namespaces else "",
                "PATH": f"{self._bin}:{os.environ['PATH']}",
            }
            with open(self.folder / "job.log", "a") as log:
                self._process = subprocess.Popen(
                    ["bash", script, *words],
                    cwd=script.parent,
                    env={**os.environ, **slurm, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._write(script=self._process.pid)
                code = self._process.wait()
            _kill_session(self._process.pid)
            self.starts.append({"machines": there, "code": code})
            state = _read(self.folder)
            if state["then"] != "queue" or state["ended"]:
                return

    def _write(self, **values) -> None:
        _update(self.folder, **values)


class RealSlurm:
    """Slurm's own daemons on this machine, several machines by name. Needs root and ``DAEMONS``."""

    def __init__(self, folder: Path, machines: int):
        self.folder = folder
        self.machines = [f"m{number}" for number in range(1, machines + 1)]
        self._daemons: list[subprocess.Popen] = []
        self._job = ""

    def __enter__(self) -> "RealSlurm":
        munge = self.folder / "munge"
        munge.mkdir(mode=0o711, parents=True)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        words = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={munge / file}" for name, file in words.items()]
        self._start("munged", "--foreground", "--force", *options)
        self._configuration().write_text(self._text(munge / "socket"))
        until((munge / "socket").exists, self._daemons_said, 20)
        (self.folder / "state").mkdir()
        self._start("slurmctld", "-D", "-f", str(self._configuration()))
        for machine in self.machines:
            (self.folder / "spool" / machine).mkdir(parents=True)
            self._start("slurmd", "-D", "-N", machine, "-f", str(self._configuration()))
        until(lambda: self._idle() == len(self.machines), self._daemons_said, 60)
        return self

    def __exit__(self, *error) -> None:
        if self._job:
            self._call("scancel", "--full", "--signal=KILL", self._job)
            self._call("scancel", self._job)
            time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()

    def submit(self, script: Path, *words: str, machines: int, submit_from: Path = ROOT, **environment: str) -> None:
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        options = [f"--nodes={machines}", f"--output={self.folder / 'job.log'}", f"--export={exported}"]
        done = self._call("sbatch", "--parsable", *options, str(script), *words, cwd=submit_from)
        assert done.returncode == 0, done.stderr
        self._job = done.stdout.strip()

    def wait(self, timeout_s: float = 400) -> tuple[str, int]:
        until(lambda: self._state()["JobState"] in ("COMPLETED", "FAILED") or self._is_held(), self.log, timeout_s)
        state = self._state()
        return (HELD if self._is_held() else DONE), int(state["ExitCode"].partition(":")[0])

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def signal(self, number: int) -> None:
        name = signal.Signals(number).name.removeprefix("SIG")
        self._call("scancel", "--batch", f"--signal={name}", self._job)

    def _is_held(self) -> bool:
        state = self._state()
        return state["JobState"] == "PENDING" and state.get("Priority") == "0"

    def _state(self) -> dict:
        words = self._call("scontrol", "show", "job", "-o", self._job).stdout.split()
        return dict(word.partition("=")[::2] for word in words)

    def _idle(self) -> int:
        return self._call("sinfo", "-h", "-N", "-t", "idle").stdout.count("\n")

    def _daemons_said(self) -> str:
        return (self.folder / "daemons.log").read_text()

    def _start(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def _call(self, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        environment = {**os.environ, "SLURM_CONF": str(self._configuration())}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)

    def _configuration(self) -> Path:
        return self.folder / "slurm.conf"

    def _text(self, munge_socket: Path) -> str:
        from tests.helpers.workers import free_port  # not at the top: a job's `srun` runs this file alone

        host, cores = socket.gethostname().partition(".")[0], os.cpu_count()
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cores}\n"
            for name in self.machines
        )
        return (
            f"ClusterName=trial\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={free_port()}\n"
            "SlurmUser=root\nSlurmdUser=root\nAuthType=auth/munge\nCredType=cred/munge\n"
            f"AuthInfo=socket={munge_socket},cred_expire=10\n"  # a job that is queued again waits for that long
            f"StateSaveLocation={self.folder}/state\nSlurmdSpoolDir={self.folder}/spool/%n\n"
            f"SlurmctldPidFile={self.folder}/slurmctld.pid\nSlurmdPidFile={self.folder}/slurmd.%n.pid\n"
            "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
            "SelectTypeParameters=CR_CPU\nSchedulerType=sched/backfill\nReturnToService=2\nMpiDefault=none\n"
            "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none\n"
            f"{nodes}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )


def may_have_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "cpt-mega-probe"], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", "cpt-mega-probe"], check=True)
    return made


def may_have_slurm() -> bool:
    """Whether Slurm's daemons can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=path) for name in DAEMONS)


def _address(machine: str) -> str:
    return f"10.213.77.{machine.removeprefix('m')}"


def _make_namespaces(machines: list[str]) -> None:
    """A switch, and each machine on it in a namespace of its own."""
    _remove_namespaces(machines)
    _ip("link", "add", "cptswitch", "type", "bridge")
    _ip("link", "set", "cptswitch", "up")
    for machine in machines:
        _ip("netns", "add", machine)
        _ip("link", "add", f"cpt{machine}", "type", "veth", "peer", "name", "eth0", "netns", machine)
        _ip("link", "set", f"cpt{machine}", "master", "cptswitch", "up")
        _ip("-n", machine, "address", "add", f"{_address(machine)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", machine, "link", "set", link, "up")


def _remove_namespaces(machines: list[str]) -> None:
    for machine in machines:
        subprocess.run(["ip", "netns", "delete", machine], capture_output=True)
        subprocess.run(
            ["ip", "link", "delete", f"cpt{machine}"], capture_output=True
        )  # the namespace may take its time
    subprocess.run(["ip", "link", "delete", "cptswitch"], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _srun(words: list[str]) -> int:
    """A task on each machine of ``--nodelist``; the highest exit code. One that fails ends the others where that is asked."""
    machines = next(w.partition("=")[2].split(",") for w in words if w.startswith("--nodelist="))
    given = words
    while words[0].startswith("--"):
        words = words[1:]
    with open(Path(os.environ["SMALL_SLURM"]) / "srun.log", "a") as log:
        log.write(" ".join(given) + "\n")
    tasks = []
    for number, machine in enumerate(machines):
        place = {"SLURMD_NODENAME": machine, "SLURM_PROCID": str(number), "SLURM_NODEID": str(number)}
        within = ["ip", "netns", "exec", machine] if os.environ["SMALL_SLURM_NAMESPACES"] else []
        tasks.append(
            subprocess.Popen([*within, *words], env={**os.environ, **place, "SLURM_NTASKS": str(len(machines))})
        )
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    ending = None
    while any(task.poll() is None for task in tasks):
        failed = any(task.returncode for task in tasks)
        if failed and ending is None and os.environ.get("SLURM_KILL_BAD_EXIT") == "1":
            ending = time.monotonic() + 30
            for task in tasks:
                task.terminate()
        if ending is not None and time.monotonic() > ending:
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def _scontrol(words: list[str]) -> int:
    folder = Path(os.environ["SMALL_SLURM"])
    state = _read(folder)
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
    elif words[:2] == ["show", "node"]:
        for name in words[-1].split(","):
            address = _address(name) if os.environ["SMALL_SLURM_NAMESPACES"] else "127.0.0.1"
            print(f"NodeName={name} Arch=x86_64 CPUs=2 NodeAddr={address} NodeHostName=host")
    elif words[:2] == ["show", "job"]:
        excluded = ",".join(state["excluded"]) or "(null)"
        print(f"JobId={words[-1]} JobState={state['shown']} ReqNodeList=(null) ExcNodeList={excluded} Command=x")
    elif words[0] in ("requeue", "requeuehold"):
        _update(folder, then="queue" if words[0] == "requeue" else HELD)
        os.kill(state["script"], signal.SIGTERM)
    elif words[0] == "update":
        if state["then"] == DONE:
            print("Job is no longer pending execution for job", file=sys.stderr)
            return 1
        _update(folder, excluded=next(w.partition("=")[2].split(",") for w in words if w.startswith("ExcNodeList=")))
    else:
        raise ValueError(words)
    return 0


def _read(folder: Path) -> dict:
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _update(folder: Path, **values) -> None:
    building = folder / f".state-{os.getpid()}"
    building.write_text(json.dumps(_read(folder) | values))
    building.replace(folder / "state.json")


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def until(holds: Callable[[], bool], said: Callable[[], str] = str, timeout_s: float = 200) -> None:
    """Waits; fails with what ``said`` gives when it takes too long."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit({"srun": _srun, "scontrol": _scontrol}[sys.argv[1]](sys.argv[2:]))

"""Groups of processes over gloo that live as long as the test session: imports and start-up are paid once a world size.

A job is a function of ``tests.helpers.jobs``, or ``other.job`` of ``tests.helpers.other``, with JSON arguments; every rank
runs it, and ``Workers.run`` returns what each returned, or raises what any of them raised. A group that fails or hangs is
killed, whole, and started again.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from threading import Timer

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
# A process has about ten threads once its job is over. Each of gloo's wakes a hundred times a second: what a job would leave
# behind slows down all that come after it.
MOST_THREADS = 30
NOISE = "CPU RNG state changed within GPU RNG context"  # of core, at every step


class JobFailed(AssertionError):
    """A rank raised; the message is its traceback. ``kind`` is the name of the exception's class."""

    def __init__(self, kind: str, message: str):
        self.kind = kind
        super().__init__(message)


class Workers:
    """``world`` processes; started at the first job."""

    def __init__(self, world: int, log_folder: Path):
        self.world, self.log_folder = world, log_folder
        self._processes: list[subprocess.Popen] = []
        self._hung: list[str] = []

    def run(self, job: str, timeout_s: float = 120.0, **arguments) -> list:
        """Runs ``tests.helpers.jobs.<job>(**arguments)`` on every rank; returns the results in rank order."""
        if not self._processes:
            self._start()
        line = json.dumps({"job": job, "arguments": arguments, "port": free_port()}) + "\n"
        timer = Timer(timeout_s, self._kill_hung)
        timer.start()
        try:
            for process in self._processes:
                process.stdin.write(line)
                process.stdin.flush()
            answers = [process.stdout.readline() for process in self._processes]
        finally:
            timer.cancel()
        return self._results(job, answers)

    def stop(self) -> None:
        """Ends the group."""
        self._kill()

    def _results(self, job: str, answers: list[str]) -> list:
        replies = [json.loads(answer) if answer else None for answer in answers]
        failed = [reply for reply in replies if reply is not None and "error" in reply]
        if len(failed) < len(replies) and (failed or None in replies):
            self._kill()  # some ranks failed and others did not: they may wait for each other
        if failed:
            raise JobFailed(failed[0]["kind"], f"{job}: {failed[0]['error']}")
        if None in replies:
            raise JobFailed("Timeout", f"{job}: a process ended or took too long\n{self._last_words()}")
        most = max(reply["threads"] for reply in replies)
        if most > MOST_THREADS:
            self._kill()
            raise JobFailed("Leak", f"{job}: {most} threads are left; its process groups are still referred to")
        return [reply["result"] for reply in replies]

    def _start(self) -> None:
        for rank in range(self.world):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.world,
                "OMP_NUM_THREADS": 1,
            }
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}}
            log = open(self.log_folder / f"world{self.world}_rank{rank}.log", "a")  # noqa: SIM115 (the process keeps it)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.helpers.workers"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            )

    def _kill_hung(self) -> None:
        """Each process first writes where its threads are into its log; forked ones too, unless they wait for a device."""
        self._hung = [line for process in self._processes for line in _family(process.pid)]
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(2)
        self._kill()

    def _last_words(self) -> str:
        said = []
        for log in sorted(self.log_folder.glob(f"world{self.world}_rank*.log")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if NOISE not in line]
            said.append(f"{log.name}:\n" + "\n".join(lines)[-4000:])
        return "\n".join([*said, *self._hung])

    def _kill(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:  # the whole session: a checkpoint writer's helpers outlive it otherwise
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in processes:
            process.wait()
            process.stdin.close()


def _family(pid: int) -> list[str]:
    """What a process and its children are doing, in the system's words."""
    lines = []
    with contextlib.suppress(psutil.Error, OSError):
        for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            waits = {(task / "wchan").read_text() for task in Path(f"/proc/{one.pid}/task").iterdir()}
            times = one.cpu_times()
            lines.append(
                f"process {one.pid} of {one.ppid()}, {one.status()}, {times.user + times.system:.1f} s computed, "
                f"{time.time() - one.create_time():.0f} s old, waits in {sorted(waits)}: {' '.join(one.cmdline())[:80]}"
            )
    return lines


def free_port() -> int:
    """Each job forms its groups anew, at a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _job(name: str):
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"tests.helpers.{module or 'jobs'}"), function)


def _serve() -> None:
    """One rank: reads jobs from standard input, answers on the original standard output; prints go to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1)
    importlib.import_module("tests.helpers.jobs")  # takes its time once
    for line in sys.stdin:
        request = json.loads(line)
        os.environ["MASTER_PORT"] = str(request["port"])
        try:
            answer = {"result": _job(request["job"])(**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"kind": type(error).__name__, "error": f"{error}\n{traceback.format_exc()}"}
        gc.collect()  # engines are rings of references, and hold the job's process groups
        answer["threads"] = len(os.listdir("/proc/self/task"))
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve()

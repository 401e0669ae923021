"""A start of a run by its command, as the campaign of faults watches it, and what a run folder says afterwards."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from fault_site import ROOT, Site

from cpt_mega.lineage import COMPLETE, file_digest
from cpt_mega.loop.run_folder import LEDGER, METRICS, read_lines

LIMIT_S, LOOK_S = 240.0, 0.01


class Launch:
    """One start of a run by its command, in a session of its own as a terminal has it."""

    def __init__(self, site: Site, run: Path, **environment: str):
        self.site, self.run, self.began = site, run, time.monotonic()
        self._starts = len(restores(run))  # before this one
        self._left = unfinished(run)
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), str(site.config), f"run.dir={run}"]
        self._log = open(site.folder / "launches.log", "a")  # noqa: SIM115 (closed by `wait`)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=site.environment | environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it would be ignored
        )
        self.tree: set[psutil.Process] = set()
        self.first_step_s: float | None = None
        self._looked = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def has_begun(self) -> bool:
        """Whether it has got as far as to say from which step it goes on; what is there before that is an earlier start's."""
        return len(restores(self.run)) > self._starts

    def is_saving(self) -> bool:
        return bool(unfinished(self.run) - self._left)

    def look(self) -> None:
        """Notes when the first new step has ended; asked again and again, looks ten times a second."""
        if self.first_step_s is None and self.seconds - self._looked > 0.1:
            self._looked = self.seconds
            if self.has_begun() and (last_step(self.run) or 0) > restores(self.run)[-1]:
                self.first_step_s = self.seconds

    def family(self) -> list[psutil.Process]:
        """The launcher and all below it."""
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.process.pid)
            found = [launcher, *launcher.children(recursive=True)]
            self.tree |= set(found)
            return found
        return []

    def ranks(self) -> list[psutil.Process]:
        """The trainer's processes, without those that write for them."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error, AttributeError):
                if "cpt_mega.launch" in process.parent().cmdline() and "cpt_mega.train" in process.cmdline():
                    found.append(process)
        return found

    def wait(self, limit_s: float = LIMIT_S) -> int | None:
        """The exit code; None, and the end of all of it, when it took too long."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()
            self._log.close()

    def kill(self) -> None:
        """kill -9 of everything that was ever seen of it."""
        self.family()
        for process in sorted(self.tree, key=lambda one: one.pid):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()  # before psutil does, or its exit code is lost
        psutil.wait_procs(self.tree, 10)


@contextlib.contextmanager
def ended(launch: Launch) -> Iterator[Launch]:
    """Nothing of a launch is left, whatever happens."""
    try:
        yield launch
    finally:
        launch.kill()


def waited(launch: Launch, holds: Callable[[], bool]) -> bool:
    """Waits; False when the run was over first, or it took too long."""
    end = time.monotonic() + LIMIT_S
    while not holds():
        if launch.is_over() or time.monotonic() > end:
            return False
        launch.look()
        time.sleep(LOOK_S)
    return not launch.is_over()


# What a run folder says.


def differences(reference: Path, run: Path) -> list[str]:
    """Why a run is not the reference, data, losses, readings and the last checkpoint; nothing when it is, bit for bit."""
    from cpt_mega.loop.comparison import compare_runs

    found, last = compare_runs(reference, run), newest_complete(reference)
    problems = [] if found.is_exact else [f"{found.first.what} differs at step {found.first.step}: {found.first.text}"]
    if found.metrics.common != last or last_step(run) != last:
        problems.append(f"{found.metrics.common} of {last} steps are in both, and the last one is {last_step(run)}")
    if last not in [one.step for one in found.weights.checkpoints]:
        problems.append(f"the last checkpoints, of steps {last} and {newest_complete(run)}, were not compared")
    if unfinished(run):
        problems.append("an unfinished checkpoint is left")
    return problems


def byte_differences(reference: Path, other: Path) -> list[str]:
    """Files that are not the same bytes, or there in one alone."""
    digests = [
        {str(file.relative_to(folder)): file_digest(file) for file in files_in(folder)} for folder in (reference, other)
    ]
    names = sorted(digests[0].keys() | digests[1].keys())
    return [f"{name} differs" for name in names if digests[0].get(name) != digests[1].get(name)]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def unfinished(run: Path) -> set[str]:
    """Names of the checkpoints that are being written, or never will be."""
    return {folder.name for folder in run.glob("checkpoints/.building-*")}


def newest_complete(run: Path) -> int:
    """Step of a run's newest sealed checkpoint; 0 when there is none."""
    return max((int(seal.parent.name[5:]) for seal in run.glob(f"checkpoints/iter_*/{COMPLETE}")), default=0)


def last_step(run: Path) -> int | None:
    """The last step in a run's metrics; None when there is none."""
    return max((line["step"] for line in read_lines(run / METRICS) if line["kind"] == "train"), default=None)


def restores(run: Path) -> list[int]:
    """The step of every start that came to its first line in the ledger."""
    return [line["step"] for line in read_lines(run / LEDGER) if line.get("kind") == "restore"]

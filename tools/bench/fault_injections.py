"""What the campaign of faults does to runs and tools, and at which moments.

Each fault has a run of its own that is hit again and again by the same command, and then compared with the reference.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from fault_launch import (
    LIMIT_S,
    Launch,
    byte_differences,
    differences,
    ended,
    last_step,
    newest_complete,
    restores,
    waited,
)
from fault_site import ROOT, Site, call
from rich.console import Console

from cpt_mega.data.indexed import plans_path
from cpt_mega.errors import ExitCode
from cpt_mega.loop.run_folder import METRICS, STATUS, STOP, read_lines, read_status

PREEMPTED = int(ExitCode.PREEMPTED)
AT_ONCE_S = 15.0
PACKING = "kill all while packing"
Times = tuple[float, float]  # of the reference, in seconds: until its first step, and in all


@dataclass
class Hits:
    """What came of one fault. ``lost``: steps done again; ``codes``: exit codes and how often; times in seconds."""

    fault: str
    injections: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    resume_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, code: int) -> None:
        self.codes[str(code)] = self.codes.get(str(code), 0) + 1


# A run: when it is hit, how, and what must be so afterwards.


@dataclass(frozen=True)
class TrainerFault:
    """One fault of the trainer.

    Attributes:
        hit: does it to a launch; the exit code that the launcher ended with, None when it took too long.
        moment: waits for when; False when the run was over before.
        codes: exit codes that are right; none: any, as for a process that was killed.
        before: what is done before each start.
        restarts: how often torchrun starts the processes again by itself.
    """

    hit: Callable[[Launch, random.Random, Hits], int | None]
    moment: Callable[[Launch, random.Random, Times], bool]
    codes: tuple[int, ...] = ()
    before: Callable[[Site], None] = lambda site: None
    restarts: int = 0

    def __call__(
        self, site: Site, hits: Hits, injections: int, draw: random.Random, times: Times, console: Console
    ) -> None:
        for attempt in itertools.count():
            run = site.folder / "runs" / f"{hits.fault.replace(' ', '_')}.{attempt}"
            problems = len(hits.problems)
            done = self._one_run(site, hits, run, injections, draw, times, console)
            hits.problems += [f"{run.name}: {problem}" for problem in differences(site.reference, run)]
            hits.survived += done if len(hits.problems) == problems else 0
            if hits.injections >= injections or hits.problems:
                return

    def _one_run(
        self, site: Site, hits: Hits, run: Path, injections: int, draw: random.Random, times: Times, console: Console
    ) -> int:
        """Hits a run until it has come to its end; how many times."""
        done, kept = 0, None
        while True:
            self.before(site)
            with ended(Launch(site, run, MAX_RESTARTS=str(self.restarts))) as launch:
                hit = hits.injections < injections and self.moment(launch, draw, times)
                if not hit:
                    waited(launch, lambda launch=launch: launch.first_step_s is not None)
                if kept is not None and launch.first_step_s is not None:
                    hits.resume_s.append(launch.first_step_s)
                if kept is not None and (problem := _went_back(run, *kept)):
                    hits.problems.append(f"{run.name}: {problem}")
                if not hit:
                    code = launch.wait()
                    if code != 0:
                        hits.problems.append(f"{run.name}: ended with exit code {code} after {done} faults")
                    return done
                code = self._hit_once(launch, hits, draw, console)
            hits.injections += 1
            done += 1
            kept = newest_complete(run), len(restores(run))
            if code == 0:
                return done

    def _hit_once(self, launch: Launch, hits: Hits, draw: random.Random, console: Console) -> int | None:
        moment, before = launch.seconds, last_step(launch.run) or 0
        code = self.hit(launch, draw, hits)
        reached, kept = last_step(launch.run) or 0, newest_complete(launch.run)
        if code != 0:
            hits.lost.append(max(0, reached - kept))
        if code is None:
            hits.problems.append(f"{launch.run.name}: did not end within {LIMIT_S:.0f} s of a fault at {moment:.1f} s")
            return None
        hits.count(code)
        at = f"{hits.fault} after {moment:.1f} s"
        console.print(f"  {at}: exit code {code}, step {reached}, checkpoint of step {kept}", style="dim")
        if self.codes and code not in self.codes:
            hits.problems.append(f"{launch.run.name}: exit code {code} after a fault at {moment:.1f} s")
        # Who ends well had nothing but the end left when it was asked to end.
        if code == 0 and not self.restarts and before < reached - 1:
            hits.problems.append(f"{launch.run.name}: asked to end at step {before}, it went on to its end")
        if code == PREEMPTED:
            hits.problems += [f"{launch.run.name}: {one}" for one in _status_problems(launch, kept)]
        return code


def _status_problems(launch: Launch, kept: int) -> Iterator[str]:
    """What a preempted run owes: a reason, and a checkpoint of the step that it came to. Nothing, before it began."""
    if not (launch.run / STATUS).exists():
        return
    status = read_status(launch.run) or {}
    if status.get("state") != "preempted" or not status.get("reason"):
        yield f"exit code 75, and status.json says {status.get('state')}: {status.get('reason')}"
    elif status["step"] > kept and status["reason"] != "interrupted":
        yield f"stopped at step {status['step']}, and the newest checkpoint is of step {kept}"


def _went_back(run: Path, kept: int, restores_before: int) -> str | None:
    """Whether a start has gone on from an earlier step than that of the newest checkpoint that stood there."""
    later = restores(run)[restores_before:]
    if later and later[0] < kept:
        return f"went on from step {later[0]}, and there was a checkpoint of step {kept}"
    return None


def at_random(launch: Launch, draw: random.Random, times: Times) -> bool:
    """A moment within what a start takes: half of them before its first step, half after."""
    first_step_s, whole_s = times
    early = draw.random() < 0.5
    moment = draw.uniform(0.3, first_step_s) if early else draw.uniform(first_step_s, whole_s)
    return waited(launch, lambda: launch.seconds > moment)


def inside(holds: Callable[[Launch], bool], comes_again: bool = True) -> Callable[[Launch, random.Random, Times], bool]:
    """As soon as something has begun, or a little later: the first to the third time, where it ``comes_again``."""

    def moment(launch: Launch, draw: random.Random, times: Times) -> bool:
        passed = draw.randrange(3) if comes_again else 0
        for number in range(passed + 1):
            if not waited(launch, lambda: holds(launch)):
                return False
            if number < passed and not waited(launch, lambda: not holds(launch)):
                return False
        time.sleep(draw.choice((0.0, 0.01, 0.05, 0.2)))
        return not launch.is_over()

    return moment


def evaluating(launch: Launch) -> bool:
    """Whether the last line is that of a step at which the reference was evaluated, and not yet of an evaluation."""
    if not launch.has_begun():
        return False
    lines = read_lines(launch.run / METRICS)
    if not lines or lines[-1]["kind"] != "train":
        return False
    looks = {line["step"] for line in read_lines(launch.site.reference / METRICS) if line["kind"] == "eval"}
    return lines[-1]["step"] in looks


def packing(launch: Launch) -> bool:
    return plans(launch.site).exists()


def plans(site: Site) -> Path:
    """Where the trainer keeps how the large corpus is packed."""
    return plans_path(site.folder / "domain")


def forget_plans(site: Site) -> None:
    shutil.rmtree(plans(site), ignore_errors=True)


def kill_one(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    """A rank; while there is none yet, the first that comes."""
    waited(launch, lambda: bool(launch.ranks()))
    ranks = sorted(launch.ranks(), key=lambda one: one.pid)
    if ranks:
        with contextlib.suppress(psutil.Error):
            draw.choice(ranks).kill()
    return launch.wait()


def kill_all(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    launch.kill()
    return launch.wait()


def terminate(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    launch.process.send_signal(signal.SIGTERM)
    return launch.wait()


def interrupt(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    """Ctrl-C: to the terminal's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launch.process.pid, signal.SIGINT)
    return launch.wait()


def interrupt_twice(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    for wait_s in (0.0, draw.uniform(0.2, 2.0)):
        end = launch.seconds + wait_s
        waited(launch, lambda end=end: launch.seconds > end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launch.process.pid, signal.SIGINT)
    begin = time.monotonic()
    code = launch.wait()
    hits.end_s.append(time.monotonic() - begin)
    if hits.end_s[-1] > AT_ONCE_S:
        hits.problems.append(f"{launch.run.name}: ended {hits.end_s[-1]:.0f} s after the second Ctrl-C")
    return code


def touch_stop(launch: Launch, draw: random.Random, hits: Hits) -> int | None:
    launch.run.mkdir(parents=True, exist_ok=True)
    (launch.run / STOP).touch()
    code = launch.wait()
    (launch.run / STOP).unlink(missing_ok=True)  # it came after the last look for it
    return code


# A tool: killed while it works, then the same command again.


@dataclass(frozen=True)
class ToolFault:
    """kill -9 of a tool, and of one of its processes where it has some.

    Attributes:
        command: given the site and the output.
        kills_workers: it has workers, and one of them may be killed instead.
    """

    command: Callable[[Site, Path], list[str]]
    kills_workers: bool = False

    def __call__(
        self, site: Site, hits: Hits, injections: int, draw: random.Random, times: Times, console: Console
    ) -> None:
        folder = site.folder / "tools" / hits.fault.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        call(self.command(site, folder / "reference" / "out"))
        whole_s = time.monotonic() - begin
        output = folder / "hit" / "out"
        while hits.injections < injections and not hits.problems:
            moment = draw.uniform(0.05, 1.1) * whole_s
            code = self._hit_once(self.command(site, output), draw, moment)
            if code is not None:
                hits.injections += 1
                hits.count(code)
                console.print(f"  {hits.fault} after {moment:.2f} of {whole_s:.2f} s: exit code {code}", style="dim")
            begin = time.monotonic()
            if code is not None and draw.random() < 0.5:  # killed again before it is done
                continue
            if not any(output.parent.glob("out*.json" if self.kills_workers else "out/*")):
                call(self.command(site, output))
                hits.resume_s.append(time.monotonic() - begin)
            hits.problems += byte_differences(folder / "reference", folder / "hit")
            shutil.rmtree(folder / "hit", ignore_errors=True)
        if (folder / "hit").exists():
            call(self.command(site, output))
            hits.problems += byte_differences(folder / "reference", folder / "hit")
        hits.survived = 0 if hits.problems else hits.injections

    def _hit_once(self, command: list[str], draw: random.Random, moment: float) -> int | None:
        """The exit code after a kill; None when the tool had ended before."""
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
                return None
            children = psutil.Process(process.pid).children(recursive=True)
            victims = [psutil.Process(process.pid), *(children if self.kills_workers else [])]
            with contextlib.suppress(psutil.Error):
                draw.choice(victims).kill()
            code = process.wait(60)
            _, alive = psutil.wait_procs(children, 30)
            if alive:
                raise SystemExit(f"{len(alive)} processes of {command[1]} outlived it by 30 s")
            return code or None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


FAULTS: dict[str, Callable] = {
    "kill one rank": TrainerFault(kill_one, at_random),
    "kill all": TrainerFault(kill_all, at_random),
    "kill one rank in an evaluation": TrainerFault(kill_one, inside(evaluating)),
    "kill all in a save": TrainerFault(kill_all, inside(Launch.is_saving)),
    PACKING: TrainerFault(kill_all, inside(packing, comes_again=False), before=forget_plans),
    "kill one rank, restarted by torchrun": TrainerFault(kill_one, at_random, (0,), restarts=1),
    "SIGTERM": TrainerFault(terminate, at_random, (0, PREEMPTED)),
    "Ctrl-C": TrainerFault(interrupt, at_random, (0, PREEMPTED)),
    "STOP": TrainerFault(touch_stop, at_random, (0, PREEMPTED)),
    "Ctrl-C twice": TrainerFault(interrupt_twice, at_random, (0, PREEMPTED)),
    "kill preprocess_data": ToolFault(lambda site, output: site.preprocess("domain", output), kills_workers=True),
    "kill import_hf": ToolFault(
        lambda site, output: site.tool("import_hf", "--hf", f"{site.folder}/hf", "--output", str(output))
    ),
    "kill export_hf": ToolFault(
        lambda site, output: site.tool("export_hf", "--checkpoint", str(site.reference), "--output", str(output))
    ),
}

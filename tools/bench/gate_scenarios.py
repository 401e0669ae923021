"""What the gates do to whole runs, on the quickstart's model and corpora: they leave a healthy run alone, turn a harmful one
round, and end one that learns nothing.

    bash tools/bench/gate_scenarios.sh [DIR] [--seeds N] [--report]

First the quickstart's own steps, up to the imported base model. Then every scenario with every seed (of data order) through
``launch/torchrun.sh``, one process, with a suite that extends ``configs/gates/general.yaml``; the harmful one also with gates
of items alone, and with gates that only warn. Of every run all decisions are taken again (``tools/replay_ledger.py``), and a
checkpoint is asked for (``tools/select_checkpoint.py``). Exit code 1 when anything is not as promised. Ctrl-C is safe: the same
command goes on.
``--report`` judges and draws again what is in DIR. About 40 minutes. Needs the extra ``plots``.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "tools"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from gate_courses import Course, read_course  # noqa: E402
from gate_items import write_word_order  # noqa: E402
from gate_pictures import draw_courses  # noqa: E402
from quickstart import Quickstart, Step, digest, plan  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cpt_mega.command_line import run_tool  # noqa: E402
from cpt_mega.errors import FaultError, InputError  # noqa: E402
from cpt_mega.gates.rules import GAIN, PERPLEXITY  # noqa: E402
from cpt_mega.gates.verdict import HARD  # noqa: E402
from cpt_mega.loop.run_folder import read_status  # noqa: E402

SUITE = """\
# What the runs are looked at with: general.yaml with fewer items and shorter prompts, for a look of seconds on one core, and
# the order of words in held-out general text: all else is near chance for so small a model.
extends: {root}/configs/gates/general.yaml
name: scenarios
row_tokens: 1024
probes:
  order: {{bucket: general, kind: choice, items: order.jsonl, style: continuation}}
  knowledge: {{shots: 0, max_items: 50}}
  reasoning: {{max_items: 50}}
  answers: {{shots: 0, max_items: 50}}
  lists: {{shots: 2, longest: 3, max_items: 50}}
  prose: {{max_items: 8}}
  boundaries: {{max_items: 8}}
"""
COMMON = """\
# What all scenarios have in common; the rest is the quickstart's.
extends: {dir}/train.yaml
parallel: {{tp: 1, sp: false}}
train: {{tokens: 120_000}}
eval: {{interval_tokens: 20_000, dense_start: false, max_tokens: 4_096}}
checkpoint: {{interval_tokens: 20_000}}
gates: {{suite: {dir}/scenarios/suite.yaml, look_share: null}}
logging: {{wandb: off, tensorboard: false}}
"""
HARMFUL = """\
# Ten times the rate and next to no replay: a source with that role has to be there for a rollback to raise its share.
extends: common.yaml
train: {{tokens: 80_000}}
optimizer: {{lr: 5.0e-3}}
data:
  sources:
    - {{name: domain, path: {dir}/data/domain, role: domain, weight: 0.999}}
    - {{name: replay, path: {dir}/data/replay, role: replay, weight: 0.001}}
eval: {{interval_tokens: 10_000}}
checkpoint: {{interval_tokens: 10_000}}
gates: {{action: roll_back, lr_factor: 0.1, replay_step: 0.2}}
"""
HEALTHY_NAME, HARMFUL_NAME, ITEMS_NAME = "healthy", "harmful", "harmful, items alone"
UNGATED_NAME, FLAT_NAME = "harmful, only warned", "flat"
ITEM_GATE = "general"  # of right-or-wrong items of that bucket
LEAST_GAIN = 0.2  # of domain perplexity in a healthy run, as the quickstart promises


@dataclass(frozen=True)
class Scenario:
    """A configuration, and what is asked of its runs."""

    name: str
    config: str
    asked: str

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "_")


SCENARIOS = (
    Scenario(HEALTHY_NAME, "extends: common.yaml\n", "no hard verdict, exit code 0, the domain 20 % better"),
    Scenario(HARMFUL_NAME, HARMFUL, "rolled back, adjusted, better general text than without gates"),
    Scenario(
        ITEMS_NAME,
        "extends: harmful.yaml\ngates: {{general_perplexity_limit: null}}\n",
        "rolled back for the items it gets wrong, better general text than without gates",
    ),
    Scenario(UNGATED_NAME, "extends: harmful.yaml\ngates: {{action: warn}}\n", "the same, for comparison"),
    Scenario(FLAT_NAME, "extends: common.yaml\noptimizer: {{lr: 1.0e-7}}\n", "stopped early, says what is left"),
)


@dataclass(frozen=True)
class Run:
    """A run, and what the tools said of it."""

    scenario: str
    seed: int
    folder: Path
    course: Course
    replayed: bool
    choice: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dir", nargs="?", type=Path, default=ROOT / "runs" / "gate_scenarios", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each scenario (default 3)")
    parser.add_argument("--report", action="store_true", help="only judge and draw again what is in DIR")
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:  # before the runs, not behind them
        raise InputError("matplotlib", "missing", "it draws the pictures: pip install 'cpt_mega[plots]'")
    folder, console = options.dir.expanduser().absolute(), Console(highlight=False)
    if not options.report:
        try:
            run_all(folder, options.seeds, console)
        except subprocess.CalledProcessError as error:
            words = f"{shlex.join(error.cmd)} ended with exit code {error.returncode}"
            raise FaultError(f"{words}; see its output, or the log named above; the same command goes on") from error
    runs = [told(folder, scenario, seed) for scenario in SCENARIOS for seed in range(1, options.seeds + 1)]
    return report(folder, runs, console)


def run_all(folder: Path, seeds: int, console: Console) -> None:
    """Makes the base model and does every run, each once. Raises CalledProcessError for a run that did not come to an end."""
    quickstart, steps = Quickstart(folder), plan(folder)
    key, _ = quickstart.make(steps[: 1 + [step.name for step in steps].index("import-base")])
    write_configs(folder)
    taken, found = [], run_steps(folder, seeds)
    for number, step in enumerate(found, 1):
        console.print(f"[dim]tail -f {folder / step.log}[/]", soft_wrap=True)
        taken.append(quickstart.do(step, digest(key, *step.command), f"{number}/{len(found)}"))
        rate = (read_status(folder / step.outputs[0]) or {"tokens": 0})["tokens"] / taken[-1]
        left = (len(found) - number) * fmean(taken)
        console.print(f"  {taken[-1]:.0f} s, {rate:,.0f} tokens/s with looks and start; about {left:.0f} s left")


def write_configs(folder: Path) -> None:
    place = folder / "scenarios"
    place.mkdir(parents=True, exist_ok=True)
    texts = {"suite": SUITE, "common": COMMON} | {scenario.slug: scenario.config for scenario in SCENARIOS}
    for name, text in texts.items():
        (place / f"{name}.yaml").write_text(text.format(dir=folder, root=ROOT))
    write_word_order(folder / "data" / "general.heldout.jsonl", place / "order.jsonl")


def run_steps(folder: Path, seeds: int) -> list[Step]:
    """A step a run; one that its gates ended has come to its end as well. All scenarios of a seed come before the next."""
    return [run_step(folder, scenario, seed) for seed in range(1, seeds + 1) for scenario in SCENARIOS]


def run_step(folder: Path, scenario: Scenario, seed: int) -> Step:
    name = f"scenarios/{scenario.slug}-{seed}"
    words = ["bash", str(ROOT / "launch" / "torchrun.sh"), f"{folder}/scenarios/{scenario.slug}.yaml"]
    words += [f"run.dir={folder}/{name}", f"train.seed={seed}"]
    stamp, title = name.replace("/", "-"), f"{scenario.name}, seed {seed}"
    return Step(stamp, title, ["env", "NPROC=1", *words], (name,), True, (0, 80), f"{name}.log")


def told(folder: Path, scenario: Scenario, seed: int) -> Run:
    """Raises FaultError for a run that is not there or has not ended."""
    run = folder / "scenarios" / f"{scenario.slug}-{seed}"
    try:
        course = read_course(run)
    except (OSError, KeyError, ValueError) as error:
        raise FaultError(f"{run} is no ended run ({error}); run this without --report") from error
    replayed = _tool("replay_ledger", str(run)).returncode == 0
    found = _tool("select_checkpoint", str(run), "--json")
    choice = _choice(json.loads(found.stdout)) if found.returncode == 0 else found.stderr.strip()
    return Run(scenario.name, seed, run, course, replayed, choice)


def _tool(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / f"{name}.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _choice(found: dict) -> str:
    j = next(one["j"]["value"] for one in found["candidates"] if one["step"] == found["step"])
    return f"step {found['step']} of {', '.join(str(one['step']) for one in found['candidates'])} (J {100 * j:+.1f})"


def report(folder: Path, runs: list[Run], console: Console) -> int:
    """The table, the pictures, and what is not as promised."""
    console.print(table(runs))
    for run in runs:
        said = f"{run.scenario}, seed {run.seed}: {run.course.state}: {run.course.reason}; chosen: {run.choice}"
        console.print(said, markup=False, soft_wrap=True)
    pictures = []
    for scenario in SCENARIOS:
        pictures.append(folder / f"{scenario.slug}.png")
        courses = courses_of(runs, scenario.name)
        others = courses_of(runs, UNGATED_NAME) if scenario.name in (HARMFUL_NAME, ITEMS_NAME) else None
        draw_courses(courses, pictures[-1], f"{scenario.name}: {scenario.asked}", others)
    missed = problems(runs)
    for problem in missed:
        console.print(f"not as promised: {problem}", markup=False, style="red", soft_wrap=True)
    values = [{"scenario": run.scenario, "seed": run.seed, **summary(run)} for run in runs]
    (folder / "gate_scenarios.json").write_text(json.dumps({"runs": values, "problems": missed}, indent=1) + "\n")
    console.print(
        f"next: xdg-open {pictures[0]}    # and beside it {', '.join(p.name for p in pictures[1:])}", soft_wrap=True
    )
    return 1 if missed else 0


def courses_of(runs: list[Run], scenario: str) -> dict[int, Course]:
    """By seed."""
    return {run.seed: run.course for run in runs if run.scenario == scenario}


def problems(runs: list[Run]) -> list[str]:
    """What is not as it should be, as sentences."""
    twins, found = courses_of(runs, UNGATED_NAME), []
    for run in runs:
        wrong = [] if run.replayed else ["decisions come out otherwise when they are taken again"]
        wrong += _CHECKS[run.scenario](run.course, twins.get(run.seed))
        found += [f"{run.scenario}, seed {run.seed}: {problem}" for problem in wrong]
    return found


def _of_healthy(course: Course, _: Course | None) -> list[str]:
    found = [f"hard verdicts: {', '.join(course.hard)}"] if course.hard else []
    found += [f"ended with {course.exit_code}"] if course.exit_code else []
    change = course.change("domain")
    return found + ([] if change <= -LEAST_GAIN else [f"domain perplexity {change:+.1%}"])


def _of_harmful(course: Course, twin: Course | None) -> list[str]:
    return _turned_round(course, twin, PERPLEXITY)


def _of_items(course: Course, twin: Course | None) -> list[str]:
    return _turned_round(course, twin, ITEM_GATE)


def _turned_round(course: Course, twin: Course | None, rule: str) -> list[str]:
    if not course.rollbacks:
        return ["no rollback"]
    fired = all(look.levels.get(rule) == HARD for look in course.rollbacks)
    found = [] if fired else [f"rolled back for something else than {rule}"]
    found += [] if course.lr_scale < 1 and course.raised_replay > 0 else ["nothing was adjusted"]
    found += [f"ended with {course.exit_code}"] if course.exit_code else []
    if twin is not None and not course.change("general") < twin.change("general"):
        found.append(f"general perplexity {course.change('general'):+.1%}, without gates {twin.change('general'):+.1%}")
    return found


def _of_ungated(course: Course, _: Course | None) -> list[str]:
    return ["a gate did more than warn"] if course.exit_code or course.rollbacks else []


def _of_flat(course: Course, _: Course | None) -> list[str]:
    stopped = course.exit_code == 80 and GAIN in course.looks[-1].levels
    return ([] if stopped else ["was not stopped"]) + (
        [] if "tokens are left" in course.reason else ["no word of savings"]
    )


_CHECKS = {
    HEALTHY_NAME: _of_healthy,
    HARMFUL_NAME: _of_harmful,
    ITEMS_NAME: _of_items,
    UNGATED_NAME: _of_ungated,
    FLAT_NAME: _of_flat,
}


def summary(run: Run) -> dict:
    """Plain values of a run."""
    course = run.course
    return {
        "tokens": course.looks[-1].tokens,
        "exit_code": course.exit_code,
        "domain": course.change("domain"),
        "general": course.change("general"),
        "general_highest": max(course.change("general", look) for look in course.looks),
        "accuracy": course.accuracy_change(),
        "hard": course.hard,
        "soft": course.soft,
        "rollbacks": [[look.tokens, look.back_to] for look in course.rollbacks],
        "lr_scale": course.lr_scale,
        "raised_replay": course.raised_replay,
        "looks": len(course.looks) - 1,
        "look_s": course.look_s,
        "wall_s": course.wall_s,
        "replayed": run.replayed,
        "choice": run.choice,
    }


def table(runs: list[Run]) -> Table:
    """A line a run; the share of wall time that looks took, over all, below."""
    shown = Table(title="gates over whole runs; perplexity since step 0", title_justify="left")
    for name in ("scenario", "seed", "tokens", "exit", "domain", "general", "highest", "accuracy", "hard", "soft"):
        shown.add_column(name, justify="left" if name in ("scenario", "hard", "soft") else "right")
    for name in ("rolled back", "taken again", "looks' share"):
        shown.add_column(name)
    for run in runs:
        found = summary(run)
        back = [f"{start // 1000}k to {end // 1000}k" for start, end in found["rollbacks"]]
        changes = [f"{found[name]:+.1%}" for name in ("domain", "general", "general_highest")]
        place = (run.scenario, str(run.seed), f"{found['tokens']:,}", str(found["exit_code"]))
        said = (f"{100 * found['accuracy']:+.1f} points", ", ".join(found["hard"]), ", ".join(found["soft"]))
        share = f"{found['look_s'] / found['wall_s']:.0%}"
        shown.add_row(*place, *changes, *said, ", ".join(back), "equal" if run.replayed else "DIFFERENT", share)
    looks = [run.course.look_s / len(run.course.looks) for run in runs]
    share = sum(run.course.look_s for run in runs) / sum(run.course.wall_s for run in runs)
    shown.caption = f"a look takes {median(looks):.1f} s (median of the runs); looks took {share:.0%} of all runs' time"
    return shown


if __name__ == "__main__":
    sys.exit(run_tool(main, "interrupted: nothing is broken; the same command goes on from here"))

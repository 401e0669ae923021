"""Ends a run, and the tools around it, in every way and at any moment, and starts it again by the same command: does it end as
the run that nothing happened to, bit for bit?

A tiny model and corpora of this machine's own text; two processes by ``launch/torchrun.sh``. Each fault has a run of its own
that is hit again and again: at moments drawn over the length of a whole start, or as soon as a save, an evaluation or the
packing of a corpus has begun. Then it is let go on to its end and compared with the reference as ``tools/compare_runs.py``
does: data, losses, readings, weights, moments. ``preprocess_data``, ``import_hf`` and ``export_hf`` are killed as often, and
must leave the same bytes. The exit code is 1 when anything did not survive. ``--seed`` draws the same moments again; what is
happening at them is the machine's.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

TRAIN = """\
run: {{dir: {folder}/reference}}
model: {{checkpoint: {folder}/import}}
precision: fp32
parallel: {{tp: 2, sp: true}}
train: {{tokens: {tokens}, seq_length: 32, global_batch_size: 8, micro_batch_size: 4}}
optimizer: {{lr: 1.0e-2, weight_decay: 0.1}}
schedule: {{kind: cosine, warmup_tokens: 300}}
data:
  sources:
    - {{name: domain, path: {folder}/domain, role: domain}}
    - {{name: replay, path: {folder}/replay, role: replay}}
eval:
  interval_tokens: 1_500
  max_tokens: 2_000
  sets: [{{path: {folder}/heldout, bucket: general}}]
gates: {{general_perplexity_limit: null}}
checkpoint: {{interval_tokens: 2_500}}
logging: {{interval_steps: 1, tensorboard: false}}
"""
VOCABULARY = 512
DOCUMENTS = {"domain": 140_000, "replay": 400, "heldout": 100}  # so many that the first one's plan is kept on disk
PREEMPTED, LIMIT_S, AT_ONCE_S, LOOK_S = 75, 240.0, 15.0, 0.01


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


class Launch:
    """One start of a run by its command, in a session of its own as a terminal has it."""

    def __init__(self, site: "Site", run: Path, **environment: str):
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


@dataclass(frozen=True)
class Site:
    """Where everything lies."""

    folder: Path
    tokens: int

    @property
    def config(self) -> Path:
        return self.folder / "train.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def tool(self, name: str, *words: str) -> list[str]:
        return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]

    def preprocess(self, name: str, output: Path) -> list[str]:
        words = ["--input", f"{self.folder}/{name}.jsonl", "--tokenizer", f"{self.folder}/hf", "--output", str(output)]
        return self.tool("preprocess_data", *words, "--workers", "2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--injections", type=int, default=5, metavar="N", help="of each fault (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument(
        "--only", action="append", metavar="FAULT", help=f"one of: {', '.join(FAULTS)}; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=8_000, help="of a run; a step has about 250 (default 8000)")
    parser.add_argument("--folder", type=Path, help="where to work; all of it stays there (default: removed)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write what was found, with versions")
    options = parser.parse_args()
    chosen = options.only or list(FAULTS)
    if unknown := set(chosen) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    console = Console(highlight=False)
    place = contextlib.nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    try:
        with place as name:
            site = Site(Path(name).absolute(), options.tokens)
            found = campaign(site, chosen, options.injections, options.seed, console, options.output)
    except KeyboardInterrupt:
        console.print("\ninterrupted: what was started has been ended")
        return 130
    console.print(table(found))
    problems = [f"{one['fault']}: {problem}" for one in found["faults"] for problem in one["problems"]]
    for problem in problems:
        console.print(f"did not survive: {problem}", markup=False, style="red")
    return 1 if problems else 0


def campaign(
    site: Site, chosen: list[str], injections: int, seed: int, console: Console, output: Path | None = None
) -> dict:
    """Runs everything; returns what was found, and writes it as it comes."""
    begin = time.monotonic()
    console.print(f"seed {seed}, {injections} injections of each of {len(chosen)} faults; making the site")
    prepare(site)
    launch = Launch(site, site.folder / "reference")
    with ended(launch):
        waited(launch, lambda: launch.first_step_s is not None)
        first_step_s = launch.first_step_s or 0.0
        code = launch.wait()
    if code != 0:
        raise SystemExit(f"the reference ended with exit code {code}; see {site.folder}/launches.log")
    whole_s = launch.seconds
    console.print(f"a start takes {first_step_s:.0f} s to its first step, the whole run {whole_s:.0f} s")
    found: list[Hits] = []
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "megatron-core")}
    report = {"seed": seed, "injections": injections, "versions": versions}
    report |= {"first_step_s": first_step_s, "whole_s": whole_s}
    for number, name in enumerate(chosen):
        started = time.monotonic()
        draw = random.Random(f"{seed} {name}")
        hits = Hits(name)
        found.append(hits)
        FAULTS[name](site, hits, injections, draw, (first_step_s, whole_s), console)
        took, left = time.monotonic() - started, len(chosen) - number - 1
        mean = (time.monotonic() - begin) / (number + 1)
        console.print(
            f"{name}: {hits.survived} of {hits.injections} survived, {took:.0f} s; about {left * mean:.0f} s left"
        )
        report["faults"] = [asdict(one) for one in found]
        report["campaign_s"] = time.monotonic() - begin
        if output:
            output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def prepare(site: Site) -> None:
    """Texts, a tokenizer and a model as a user has them, the corpora, the import, the configuration."""
    from machine_text import docstring_prose, python_sources

    site.folder.mkdir(parents=True, exist_ok=True)
    prose = docstring_prose()
    for name, texts in (("heldout", prose), ("replay", prose), ("domain", lines_of(python_sources()))):
        with open(site.folder / f"{name}.jsonl", "w") as stream:
            for text in itertools.islice(texts, DOCUMENTS[name]):
                stream.write(json.dumps({"text": text}) + "\n")
    make_model(site)
    for name in DOCUMENTS:
        call(site.preprocess(name, site.folder / name))
    call(site.tool("import_hf", "--hf", f"{site.folder}/hf", "--output", f"{site.folder}/import"))
    site.config.write_text(TRAIN.format(folder=site.folder, tokens=site.tokens))


def lines_of(texts: Iterator[str]) -> Iterator[str]:
    """Lines that say something, again and again if there are too few of them."""
    lines = [line for text in itertools.islice(texts, 500) for line in text.splitlines() if len(line) > 20]
    return itertools.cycle(lines)


def make_model(site: Site) -> None:
    """A random Llama of some ten thousand parameters and a tokenizer trained on its text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((site.folder / "replay.jsonl").read_text().splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(site.folder / "hf")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(site.folder / "hf")


def call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")


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
    moment: Callable[[Launch, random.Random, tuple[float, float]], bool]
    codes: tuple[int, ...] = ()
    before: Callable[[Site], None] = lambda site: None
    restarts: int = 0

    def __call__(
        self, site: Site, hits: Hits, injections: int, draw: random.Random, times: tuple, console: Console
    ) -> None:
        for attempt in itertools.count():
            run = site.folder / "runs" / f"{hits.fault.replace(' ', '_')}.{attempt}"
            problems = len(hits.problems)
            done = self._one_run(site, hits, run, injections, draw, times, console)
            hits.problems += [f"{run.name}: {problem}" for problem in differences(site.folder / "reference", run)]
            hits.survived += done if len(hits.problems) == problems else 0
            if hits.injections >= injections or hits.problems:
                return

    def _one_run(self, site, hits, run, injections, draw, times, console) -> int:
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
        console.print(
            f"  {hits.fault} after {moment:.1f} s: exit code {code}, step {reached}, checkpoint of step {kept}",
            style="dim",
        )
        if self.codes and code not in self.codes:
            hits.problems.append(f"{launch.run.name}: exit code {code} after a fault at {moment:.1f} s")
        if (
            code == 0 and not self.restarts and before < (last_step(launch.run) or 0) - 1
        ):  # nothing but the end was left
            hits.problems.append(f"{launch.run.name}: asked to end at step {before}, it went on to its end")
        if code == PREEMPTED:
            hits.problems += [f"{launch.run.name}: {one}" for one in _status_problems(launch, kept)]
        return code


def _status_problems(launch: Launch, kept: int) -> Iterator[str]:
    """What a preempted run owes: a reason, and a checkpoint of the step that it came to. Nothing, before it began."""
    status = read_json(launch.run / "status.json")
    if not (launch.run / "status.json").exists():
        return
    if status.get("state") != "preempted" or not status.get("reason"):
        yield f"exit code 75, and status.json says {status.get('state')}: {status.get('reason')}"
    elif status["step"] > kept and status["reason"] != "interrupted":
        yield f"stopped at step {status['step']}, and the newest checkpoint is of step {kept}"


def _went_back(run: Path, kept: int, restores_before: int) -> str | None:
    """Whether a start has gone on from an earlier step than that of the newest checkpoint that stood there."""
    later = restores(run)[restores_before:]
    return (
        f"went on from step {later[0]}, and there was a checkpoint of step {kept}"
        if later and later[0] < kept
        else None
    )


def at_random(launch: Launch, draw: random.Random, times: tuple[float, float]) -> bool:
    """A moment within what a start takes: half of them before its first step, half after."""
    first_step_s, whole_s = times
    early = draw.random() < 0.5
    moment = draw.uniform(0.3, first_step_s) if early else draw.uniform(first_step_s, whole_s)
    return waited(launch, lambda: launch.seconds > moment)


def inside(
    holds: Callable[[Launch], bool], comes_again: bool = True
) -> Callable[[Launch, random.Random, tuple[float, float]], bool]:
    """As soon as something has begun, or a little later: the first to the third time, where it ``comes_again``."""

    def moment(launch: Launch, draw: random.Random, times: tuple[float, float]) -> bool:
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
    lines = read_lines(launch.run / "metrics.jsonl")
    if not lines or lines[-1]["kind"] != "train":
        return False
    looks = {
        line["step"]
        for line in read_lines(launch.site.folder / "reference" / "metrics.jsonl")
        if line["kind"] == "eval"
    }
    return lines[-1]["step"] in looks


def packing(launch: Launch) -> bool:
    return plans(launch.site).exists()


def plans(site: Site) -> Path:
    """Where the trainer keeps how the large corpus is packed."""
    return site.folder / "domain.plans"


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
    (launch.run / "STOP").touch()
    code = launch.wait()
    (launch.run / "STOP").unlink(missing_ok=True)  # it came after the last look for it
    return code


# A tool: killed while it works, then the same command again.


@dataclass(frozen=True)
class ToolFault:
    """kill -9 of a tool, and of one of its processes where it has some.

    Attributes:
        command: given the site and the output.
        reference: what stands in the site from an undisturbed call; None: it is made first.
    """

    command: Callable[[Site, Path], list[str]]
    kills_workers: bool = False

    def __call__(
        self, site: Site, hits: Hits, injections: int, draw: random.Random, times: tuple, console: Console
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
    "kill all while packing": TrainerFault(kill_all, inside(packing, comes_again=False), before=forget_plans),
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
        lambda site, output: site.tool("export_hf", "--checkpoint", f"{site.folder}/reference", "--output", str(output))
    ),
}


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
        {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files_in(folder)}
        for folder in (reference, other)
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
    return max((int(seal.parent.name[5:]) for seal in run.glob("checkpoints/iter_*/COMPLETE")), default=0)


def last_step(run: Path) -> int | None:
    """The last step in a run's metrics; None when there is none."""
    return max((line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"), default=None)


def restores(run: Path) -> list[int]:
    """The step of every start that came to its first line in the ledger."""
    return [line["step"] for line in read_lines(run / "ledger.jsonl") if line.get("kind") == "restore"]


def waited(launch: Launch, holds: Callable[[], bool]) -> bool:
    """Waits; False when the run was over first, or it took too long."""
    end = time.monotonic() + LIMIT_S
    while not holds():
        if launch.is_over() or time.monotonic() > end:
            return False
        launch.look()
        time.sleep(LOOK_S)
    return not launch.is_over()


@contextlib.contextmanager
def ended(launch: Launch) -> Iterator[Launch]:
    """Nothing of a launch is left, whatever happens."""
    try:
        yield launch
    finally:
        launch.kill()


def read_lines(path: Path) -> list[dict]:
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def read_json(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def table(found: dict) -> Table:
    """A line a fault."""
    words = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    shown = Table(title=f"faults (seed {found['seed']}; {words})")
    for name in ("fault", "injections", "survived", "steps lost, most", "exit codes", "time to resume, median"):
        shown.add_column(name, justify="left" if name in ("fault", "exit codes") else "right")
    for one in found["faults"]:
        codes = ", ".join(f"{code} ({count})" for code, count in sorted(one["codes"].items()))
        resume = f"{median(one['resume_s']):.1f} s" if one["resume_s"] else ""
        lost = str(max(one["lost"])) if one["lost"] else ""
        shown.add_row(one["fault"], str(one["injections"]), str(one["survived"]), lost, codes, resume)
    return shown


if __name__ == "__main__":
    sys.exit(main())

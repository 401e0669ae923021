"""Looks: all probes at step 0, at their times and at the end; the rules on what they found.

Every item's score is a line of ``items.jsonl``, so that readings and verdicts can be computed again. The step-0 score of each
item is part of every checkpoint, under the digest of its probe: what was measured on other items is no baseline.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cpt_mega.checkpoint.trainer_state import Look, TrainerState
from cpt_mega.errors import InputError
from cpt_mega.gates.arming import armed, disagreement, notes_on
from cpt_mega.gates.asking import Interrupted
from cpt_mega.gates.changes import bucket_changes
from cpt_mega.gates.diagnosis import lines_of, stage_reading
from cpt_mega.gates.looks import look_due
from cpt_mega.gates.requests import Likeliest
from cpt_mega.gates.rules import GAIN, PRICE, Judge
from cpt_mega.gates.suite import Found, Suite, perplexity_by_bucket, take_look
from cpt_mega.gates.verdict import CONTINUE, HARD, NONE, WARN, LookScores, Verdict, strongest
from cpt_mega.json_types import finite
from cpt_mega.loop.callbacks import Control, NullCallback
from cpt_mega.loop.diagnosing import evidence
from cpt_mega.loop.references import references, run_of
from cpt_mega.loop.reporters import Reporter
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer
from cpt_mega.loop.verdict_actions import act


class Evaluation(NullCallback):
    """Takes looks and judges.

    Args:
        control: ends a look, within a few micro-batches, when the run is asked to end.
        origin: the checkpoint that the run starts from: nothing may be trained, and it be judged by the baseline of its run.
    """

    def __init__(
        self,
        suite: Suite,
        judge: Judge,
        folder: RunFolder,
        reporters: Sequence[Reporter],
        console: Console,
        control: Control,
        origin: Path,
    ):
        self.suite, self.judge = suite, judge
        self.folder, self.reporters, self.console = folder, reporters, console
        self.control, self.origin = control, origin
        self._references: dict[str, Likeliest] = {}
        self._items: list[int] | None = None  # the last look's, in items.jsonl
        self._look_s = 0.0  # that looks took since the ledger was last told

    def on_start(self, trainer: Trainer) -> None:
        """Takes the baseline of every probe that has none: all at step 0, new ones when the items were changed later.

        Judges where nothing is trained and the checkpoint's run has a baseline, where a gate stopped the run, and where a stop
        came into the middle of a look.
        """
        has_baseline = bool(trainer.state.baseline or trainer.state.item_baseline)
        only_judges = has_baseline and not trainer.config.train.tokens
        try:
            known, folders = trainer.state.item_baseline.keys(), [self.folder.path, run_of(self.origin)]
            self._references = references(
                trainer.engine, self.suite, folders, known, lambda: self.control.ends(trainer)
            )
            found = self._take_baseline(trainer) if self._missing(trainer) else None
            self._arm(trainer)
            if trainer.state.gate_stop or trainer.state.look_pending or only_judges:
                self._judge(trainer, found)  # a verdict holds until the same judge says otherwise
        except Interrupted:
            self.control.end(trainer)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """Looks and judges where that is due; ``tokens`` were in the step that ends here. Raises FaultError for a step whose
        numbers are not finite."""
        now = trainer.state.tokens
        due = look_due(trainer.config, now - tokens, now) or trainer.ends_here
        if not (due and trainer.state.judged_step != trainer.state.step and self.suite.probes):
            return
        trainer.settle()
        trainer.state.look_pending = True
        try:
            self._judge(trainer)
        except Interrupted:
            self.control.end(trainer)

    def _missing(self, trainer: Trainer) -> list[str]:
        """Probes without a baseline, and those that make up a bucket without one."""
        state, suite = trainer.state, self.suite
        unknown = suite.perplexity_buckets - state.baseline.keys()
        return [
            p.name
            for p in suite.probes
            if self._is_new(state, p.name) or (p.name in suite.of_buckets and p.bucket in unknown)
        ]

    def _is_new(self, state: TrainerState, probe: str) -> bool:
        return self.suite.digests[probe] not in state.item_baseline

    def _take_baseline(self, trainer: Trainer) -> list[Found]:
        """What a probe has of step 0 stays; only what is missing is taken."""
        state, missing = trainer.state, self._missing(trainer)
        found = self._look(trainer)
        noise = self._noise(trainer, missing, found)  # before anything is kept: a signal may end it
        for one in found:
            if self._is_new(state, one.probe.name):
                scores = {item.id: item.score for item in one.items if math.isfinite(item.score)}
                state.item_baseline = {**state.item_baseline, self.suite.digests[one.probe.name]: scores}
        state.item_noise = {**state.item_noise, **noise}
        values = perplexity_by_bucket(self.suite, found)
        taken = {bucket: values[bucket] for bucket in sorted(values.keys() - state.baseline.keys())}
        state.baseline = {**state.baseline, **taken}
        state.baseline_tokens = {**state.baseline_tokens, **dict.fromkeys(taken, state.tokens)}
        place = {"step": state.step, "tokens": state.tokens}
        readings = {one.probe.name: one.to_json()[0]["value"] for one in found if one.probe.name in missing}
        digests = {name: self.suite.digests[name] for name in missing}
        line = {"kind": "baseline", **place, "perplexity": _plain(taken), "readings": readings, "digests": digests}
        self.folder.decide(line | {"items": self._items, "look_s": self._taken_s()})
        return found

    def _judge(self, trainer: Trainer, found: list[Found] | None = None) -> None:
        """``found``: by a look at this very step."""
        state = trainer.state
        if not self.suite.probes:
            self._lift(trainer)
            return
        found = self._look(trainer) if found is None else found
        values, earlier = perplexity_by_bucket(self.suite, found), self._earlier(state)
        verdicts = self._verdicts(trainer, self._scores(trainer, found, values), earlier)
        if verdicts is None:
            return
        state.judged_step, state.look_pending, state.gate_stop = state.step, False, ""
        action = strongest(verdicts) if verdicts else "none"
        look = {"step": state.step, "tokens": state.tokens, "perplexity": values, "action": action}
        look["objections"] = {verdict.rule: verdict.level for verdict in verdicts if verdict.level != NONE}
        scores = bucket_changes(found, self.suite.digests, state.item_baseline)
        look |= {"scores": scores, "weights": dict(self.suite.weights)}
        look["judged_by"] = [verdict.rule for verdict in verdicts]
        state.gate_history = [*earlier, look]
        said = [verdict.to_json() for verdict in verdicts]
        place = {"step": state.step, "tokens": state.tokens, "items": self._items, "look_s": self._taken_s()}
        trainer.decide({"kind": "verdict", **place, "perplexity": _plain(values), "action": action, "verdicts": said})
        if action not in ("none", CONTINUE, WARN):
            trainer.complete_what_was_begun()  # a save that ends is one to go back to, and lets older ones go
        if self.folder.writes:
            try:
                self._explain(trainer, found, verdicts)
            except Exception as error:  # other ranks wait, and what was decided is to be done
                self.console.print(f" what to look at cannot be told: {error!r}", style="yellow")
        act(trainer, self.folder, action, "; ".join(one.reason for one in verdicts if one.action == action))

    def _verdicts(self, trainer: Trainer, scores: LookScores, earlier: list[Look]) -> list[Verdict] | None:
        """By the main process for all ranks. None where a rule of the user's failed: the run ends with what it has, and the
        next start judges first."""
        found, problem = None, None
        if trainer.engine.mesh.is_main:
            try:
                found = self.judge.verdicts(scores, earlier)
            except InputError as error:
                problem = str(error)
        found, problem = trainer.engine.mesh.share((found, problem))
        if problem is not None:
            trainer.state.look_pending = True
            trainer.stop("config_error", problem)
        return found

    def _lift(self, trainer: Trainer) -> None:
        """Nothing is left that could judge again what a gate stopped the run for."""
        state = trainer.state
        if state.gate_stop:
            self.folder.decide({"kind": "gate_stop_lifted", "step": state.step, "reason": state.gate_stop})
            self.console.print(
                f" nothing judges any more why a gate stopped this run: {state.gate_stop}", style="yellow"
            )
        state.gate_stop, state.look_pending = "", False

    def _explain(self, trainer: Trainer, found: Sequence[Found], verdicts: Sequence[Verdict]) -> None:
        """What to look at, where a gate finds harm; what the stage has done, where it ends."""
        state = trainer.state
        scores = state.gate_history[-1]["scores"]
        if any(verdict.level == HARD and verdict.rule not in (GAIN, PRICE) for verdict in verdicts):
            lines = lines_of(evidence(trainer, found, self.folder.path, self.origin), scores)
        elif trainer.ends_here and self.suite.rules is not None:
            lines = [f"what the look says: {stage_reading(scores)}"]
        else:
            lines = []
        for line in lines:
            self.console.print(f" {line}", style="yellow")

    def _earlier(self, state: TrainerState) -> list[Look]:
        """Looks before this one; one at the same step was of the same weights."""
        return [look for look in state.gate_history if look["step"] != state.step]

    def _scores(self, trainer: Trainer, found: Sequence[Found], perplexity: dict[str, float]) -> LookScores:
        state = trainer.state
        before = {name: state.item_baseline.get(digest, {}) for name, digest in self.suite.digests.items()}
        now = {one.probe.name: {item.id: item.score for item in one.items} for one in found}
        return LookScores(
            state.step, state.tokens, state.baseline, perplexity, before, now, since=state.baseline_tokens
        )

    def _noise(self, trainer: Trainer, missing: Sequence[str], found: Sequence[Found]) -> dict[str, float]:
        """Scores the items of gates a second time: on some devices the same weights do not give the same answers. By digest."""
        digests = self.suite.digests
        gated = {probe for gate in self.judge.item_gates for probe in gate.probes} & set(missing)
        again = self.suite.without({probe.name for probe in self.suite.probes} - gated)
        if not gated:
            return {}
        first, begin = {one.probe.name: one.items for one in found}, time.perf_counter()
        found = take_look(trainer.engine, again, None, lambda: self.control.ends(trainer))
        self._look_s += time.perf_counter() - begin
        return {digests[one.probe.name]: disagreement(first[one.probe.name], one.items) for one in found}

    def _arm(self, trainer: Trainer) -> None:
        """From here on gates know how far step 0 agrees with itself; the ledger has all that verdicts depend on."""
        state, digests = trainer.state, self.suite.digests
        noise = {name: state.item_noise[digest] for name, digest in digests.items() if digest in state.item_noise}
        said = set(notes_on(self.judge))
        self.judge = armed(self.judge, noise, {probe.name: len(probe.ids) for probe in self.suite.probes})
        for note in notes_on(self.judge):
            if note not in said:
                self.console.print(f" {note}", style="yellow")
        buckets = {probe.name: probe.bucket for probe in self.suite.probes if probe.name in self.suite.of_buckets}
        line = {"kind": "gates", "step": state.step, **self.judge.to_json(), "perplexity_probes": buckets}
        self.folder.decide(line | {"digests": digests})

    def _look(self, trainer: Trainer) -> list[Found]:
        """Raises Interrupted, on all ranks, when the run is asked to end meanwhile; nothing is written then."""
        begin = time.perf_counter()
        found = take_look(trainer.engine, self.suite, self._references, lambda: self.control.ends(trainer))
        if self.folder.writes:
            self._write(trainer, found)
            self._say(trainer, found, time.perf_counter() - begin)
        self._look_s += time.perf_counter() - begin
        return found

    def _taken_s(self) -> float:
        """Seconds that looks took since this was last asked: what the gates cost a run."""
        seconds, self._look_s = self._look_s, 0.0
        return round(seconds, 3)

    def _write(self, trainer: Trainer, found: Sequence[Found]) -> None:
        place = {"step": trainer.state.step, "tokens": trainer.state.tokens}
        for one in found:
            for reading in one.to_json():
                self.folder.metric({"kind": "eval", **place, **reading})
        digests = self.suite.digests
        self._items = self.folder.items(
            {**place, "digest": digests[one.probe.name], **line} for one in found for line in one.lines()
        )

    def _say(self, trainer: Trainer, found: Sequence[Found], seconds: float) -> None:
        values = perplexity_by_bucket(self.suite, found)
        words = [
            _change(f"{bucket} perplexity", value, trainer.state.baseline.get(bucket))
            for bucket, value in values.items()
        ]
        words += [
            f"{one.probe.name} {one.readings[0].metric}: {one.readings[0].value:.4g}" for one in self._others(found)
        ]
        self.console.print(
            f" validation at iteration {trainer.state.step:8d} | {' | '.join(words)} | {seconds:.1f} s |", style="bold"
        )
        losses = {f"lm loss validation/{name}": math.log(value) for name, value in values.items()}
        scalars = {"lm loss validation": sum(losses.values()) / len(losses), **losses} if losses else {}
        scalars.update({f"lm loss validation ppl/{name}": value for name, value in values.items()})
        for one in self._others(found):
            scalars.update({f"probes/{one.probe.name}/{reading.metric}": reading.value for reading in one.readings})
        for reporter in self.reporters:
            reporter.scalars(trainer.state.step, scalars)

    def _others(self, found: Sequence[Found]) -> list[Found]:
        """What is not told as the perplexity of its bucket alone."""
        return [one for one in found if len(one.readings) > 1]


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


def _change(name: str, value: float, base: float | None) -> str:
    return f"{name}: {value:.3f}" + (f" ({value / base - 1:+.1%})" if base else "")

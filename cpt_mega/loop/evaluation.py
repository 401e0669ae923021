"""Looks: all probes at step 0, at their times and at the end.

Every item's score is a line of ``items.jsonl``, so that readings and verdicts can be computed again. The step-0 score of each
item is part of every checkpoint, under the digest of its probe: what was measured on other items is no baseline.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.gates.arming import disagreement
from cpt_mega.gates.asking import Interrupted
from cpt_mega.gates.looks import look_due
from cpt_mega.gates.requests import Likeliest
from cpt_mega.gates.suite import Found, Suite, perplexity_by_bucket, take_look
from cpt_mega.json_types import finite_values
from cpt_mega.loop.callbacks import Control, NullCallback
from cpt_mega.loop.judging import Judging
from cpt_mega.loop.references import references, run_of
from cpt_mega.loop.reporters import Reporter
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer


class Evaluation(NullCallback):
    """Takes looks, and has them judged.

    Args:
        control: ends a look, within a few micro-batches, when the run is asked to end.
        origin: the checkpoint that the run starts from: nothing may be trained, and it be judged by the baseline of its run.
    """

    def __init__(
        self,
        suite: Suite,
        judging: Judging,
        folder: RunFolder,
        reporters: Sequence[Reporter],
        console: Console,
        control: Control,
        origin: Path,
    ):
        self.suite, self.judging = suite, judging
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
            self.judging.arm(trainer)
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
        line = {
            "kind": "baseline",
            **place,
            "perplexity": finite_values(taken),
            "readings": readings,
            "digests": digests,
        }
        self.folder.decide(line | {"items": self._items, "look_s": self._taken_s()})
        return found

    def _judge(self, trainer: Trainer, found: list[Found] | None = None) -> None:
        """``found``: by a look at this very step."""
        if not self.suite.probes:
            self.judging.lift(trainer)
            return
        found = self._look(trainer) if found is None else found
        self.judging.judge(trainer, found, {"items": self._items, "look_s": self._taken_s()})

    def _noise(self, trainer: Trainer, missing: Sequence[str], found: Sequence[Found]) -> dict[str, float]:
        """Scores the items of gates a second time: on some devices the same weights do not give the same answers. By digest."""
        digests = self.suite.digests
        gated = {probe for gate in self.judging.rules.item_gates for probe in gate.probes} & set(missing)
        again = self.suite.without({probe.name for probe in self.suite.probes} - gated)
        if not gated:
            return {}
        first, begin = {one.probe.name: one.items for one in found}, time.perf_counter()
        found = take_look(trainer.engine, again, None, lambda: self.control.ends(trainer))
        self._look_s += time.perf_counter() - begin
        return {digests[one.probe.name]: disagreement(one.probe, first[one.probe.name], one.items) for one in found}

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


def _change(name: str, value: float, base: float | None) -> str:
    return f"{name}: {value:.3f}" + (f" ({value / base - 1:+.1%})" if base else "")

"""What is made of a look: the rules' verdicts, a line of the ledger, words for the user, and what is done to the run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cpt_mega.checkpoint.trainer_state import Look, TrainerState
from cpt_mega.errors import InputError
from cpt_mega.gates.arming import armed, notes_on
from cpt_mega.gates.changes import bucket_changes
from cpt_mega.gates.diagnosis import harmed_buckets, lines_of, stage_reading
from cpt_mega.gates.rule_functions import function_digest
from cpt_mega.gates.rules import FLAT, Judge
from cpt_mega.gates.suite import Found, Suite, perplexity_by_bucket
from cpt_mega.gates.verdict import CONTINUE, HARD, NOT_JUDGED, WARN, LookScores, Verdict, outcome
from cpt_mega.json_types import finite_values
from cpt_mega.loop.diagnosing import evidence
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer
from cpt_mega.loop.verdict_actions import act


class Judging:
    """Judges looks and acts.

    Args:
        origin: the checkpoint that the run starts from.
    """

    def __init__(self, suite: Suite, rules: Judge, folder: RunFolder, console: Console, origin: Path):
        self.suite, self.rules = suite, rules
        self.folder, self.console, self.origin = folder, console, origin
        self._explained: set[str] = set()  # the buckets whose harm the last look explained

    def arm(self, trainer: Trainer) -> None:
        """From here on gates know how far step 0 agrees with itself; the ledger has all that verdicts depend on."""
        state, digests = trainer.state, self.suite.digests
        noise = {name: state.item_noise[digest] for name, digest in digests.items() if digest in state.item_noise}
        said = set(notes_on(self.rules))
        self.rules = armed(self.rules, noise, {probe.name: len(probe.ids) for probe in self.suite.probes})
        for note in notes_on(self.rules):
            if note not in said:
                self.console.print(f" {note}", style="yellow")
        buckets = {probe.name: probe.bucket for probe in self.suite.probes if probe.name in self.suite.of_buckets}
        line = {"kind": "gates", "step": state.step, **self.rules.to_json(), "perplexity_probes": buckets}
        files = {name: function_digest(name) for name in self.rules.functions}
        self.folder.decide(line | {"digests": digests, "function_files": files})

    def judge(self, trainer: Trainer, found: Sequence[Found], about: Mapping[str, object]) -> None:
        """Takes the verdicts and does what the strongest asks for; ``about``: what else the ledger's line says of the look.

        Raises RollBack, on all ranks, for the run to go on from a checkpoint.
        """
        state, values = trainer.state, perplexity_by_bucket(self.suite, found)
        # one at this very step was of the same weights
        earlier = [look for look in state.gate_history if look["step"] != state.step]
        verdicts = self._verdicts(trainer, self._scores(state, found, values), earlier)
        if verdicts is None:
            return
        state.judged_step, state.look_pending, state.gate_stop = state.step, False, ""
        state.gate_history = [*earlier, self._look(state, found, values, verdicts)]
        action, place = state.gate_history[-1]["action"], {"step": state.step, "tokens": state.tokens, **about}
        told = {"perplexity": finite_values(values), "action": action, "verdicts": [one.to_json() for one in verdicts]}
        trainer.decide({"kind": "verdict", **place, **told})
        if action not in (NOT_JUDGED, CONTINUE, WARN):
            trainer.complete_what_was_begun()  # a save that ends is one to go back to, and lets older ones go
        if self.folder.writes:
            try:
                self._explain(trainer, found, verdicts)
            except Exception as error:  # other ranks wait, and what was decided is to be done
                self.console.print(f" what to look at cannot be told: {error!r}", style="yellow")
        act(trainer, self.folder, action, "; ".join(one.reason for one in verdicts if one.action == action))

    def lift(self, trainer: Trainer) -> None:
        """Nothing is left that could judge again what a gate stopped the run for."""
        state = trainer.state
        if state.gate_stop:
            self.folder.decide({"kind": "gate_stop_lifted", "step": state.step, "reason": state.gate_stop})
            self.console.print(
                f" nothing judges any more why a gate stopped this run: {state.gate_stop}", style="yellow"
            )
        state.gate_stop, state.look_pending = "", False

    def _verdicts(self, trainer: Trainer, scores: LookScores, earlier: list[Look]) -> list[Verdict] | None:
        """By the main process for all ranks. None where a rule of the user's failed: the run ends with what it has, and the
        next start judges first."""
        found, problem = None, None
        if trainer.engine.mesh.is_main:
            try:
                found = self.rules.verdicts(scores, earlier)
            except InputError as error:
                problem = str(error)
        found, problem = trainer.engine.mesh.share((found, problem))
        if problem is not None:
            trainer.state.look_pending = True
            trainer.stop("config_error", problem)
        return found

    def _scores(self, state: TrainerState, found: Sequence[Found], perplexity: dict[str, float]) -> LookScores:
        before = {name: state.item_baseline.get(digest, {}) for name, digest in self.suite.digests.items()}
        now = {one.probe.name: {item.id: _known(item.score) for item in one.items} for one in found}
        since = state.baseline_tokens
        return LookScores(state.step, state.tokens, state.baseline, perplexity, before, now, since)

    def _look(
        self, state: TrainerState, found: Sequence[Found], perplexity: dict[str, float], verdicts: Sequence[Verdict]
    ) -> Look:
        """What the state keeps."""
        look = {"step": state.step, "tokens": state.tokens, "perplexity": perplexity, **outcome(verdicts)}
        look["scores"] = bucket_changes(found, self.suite.digests, state.item_baseline)
        return look | {"weights": dict(self.suite.weights), "judged_by": [verdict.rule for verdict in verdicts]}

    def _explain(self, trainer: Trainer, found: Sequence[Found], verdicts: Sequence[Verdict]) -> None:
        """What to look at, where a gate finds harm; what the stage has done, where it ends."""
        scores = trainer.state.gate_history[-1]["scores"]
        hard = {verdict.rule for verdict in verdicts if verdict.level == HARD}
        harmed = harmed_buckets(hard)
        if harmed:
            lines = list(lines_of(evidence(trainer, found, self.folder.path, self.origin), scores, harmed))
            if harmed == self._explained:  # at the last look, and nothing was done about it: one line is enough
                lines = lines[:1]
        elif trainer.ends_here and self.suite.rules is not None and hard <= FLAT:
            lines = [f"what the look says: {stage_reading(scores)}"]
        else:
            lines = []
        self._explained = harmed
        for line in lines:
            self.console.print(f" {line}", style="yellow")


def _known(score: float) -> float:
    """NaN for all that the ledger cannot hold: a decision that is taken again sees what this one saw."""
    return score if math.isfinite(score) else math.nan

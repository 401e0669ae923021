"""The guard of a run: judges every step before its update, climbs the ladder of ``gates/anomaly.py``, rolls the run back.

Whatever it decides is in the ledger before it takes effect, with the documents it is about. Its own state is part of every
checkpoint, and so is a pure function of the steps before: a stopped run that goes on decides as an unbroken one. From the
ledger alone the decisions can be taken again (``anomaly.replay``), also where what caused them does not come again.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch import Tensor

from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.config import Config
from cpt_mega.config.schema import AnomalyOptions
from cpt_mega.data.stream import RowRef
from cpt_mega.engine.step import mean_loss
from cpt_mega.errors import InputError, RollBack
from cpt_mega.gates.anomaly import (
    CLIP,
    LOWER,
    NONE,
    ROLL_BACK,
    SKIP,
    AnomalyState,
    Finding,
    accept,
    alarm,
    blamed,
    expect_change,
    first_losses,
    judge,
    rollback_target,
)
from cpt_mega.gates.selection import objected_steps
from cpt_mega.gates.steering import Steering
from cpt_mega.hf.locate import complete_steps
from cpt_mega.json_types import finite
from cpt_mega.loop import rollback
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.prefetch import DrawnBatch
from cpt_mega.loop.run_folder import read_lines
from cpt_mega.loop.trainer import Trainer

KIND = "anomaly"  # of its lines in the ledger
ACT, LOG, OFF = "act", "log", "off"
RESTORE_LR = "restore_lr"
_SESSION = "restore"  # the kind of the line that each start writes, also that after a rollback


def make_guard(config: Config, state: TrainerState, vocab_size: int) -> "AnomalyGuard":
    """The guard that a configuration asks for. Raises InputError for a ledger that cannot be replayed."""
    if config.anomaly.replay is None:
        return AnomalyGuard(config.anomaly, state, vocab_size, Path(config.run.dir), config.optimizer.clip_norm)
    return ReplayedGuard(config.anomaly, state, Path(config.anomaly.replay))


class AnomalyGuard(NullCallback):
    """Judges by the run's own steps; see ``anomaly.action``. All ranks judge, on the same numbers.

    Args:
        state: the run's, restored or new.
        vocab_size: of the model.
        run_dir: the run folder.
        clip_norm: what every gradient is scaled down to anyway; 0 for none.
    """

    def __init__(
        self, options: AnomalyOptions, state: TrainerState, vocab_size: int, run_dir: Path, clip_norm: float = 0.0
    ):
        self.options, self.state, self.vocab_size, self.run_dir = options, state, vocab_size, run_dir
        self.clip_norm = clip_norm
        self.known = AnomalyState.from_json(state.anomaly)
        self._rolls_back = False

    @property
    def lr_scale(self) -> float:
        """What the schedule's rate is multiplied by in the next step."""
        return self.known.lr_scale

    def refusal_is_a_fault(self, step: int) -> bool:
        """Whether a loss or gradient that is not finite ends the run."""
        return self.options.action != ACT

    def expect_change(self) -> None:
        """The run is about to train on another mixture."""
        expect_change(self.known)
        self.state.anomaly = self.known.to_json()

    def judge(self, trainer: Trainer, step: int, batch: DrawnBatch, row_losses: Tensor, norm: float) -> float | None:
        """The engine's judge of step ``step``."""
        loss = mean_loss(row_losses)
        finding = self._finding(loss, norm)
        if finding.what != NONE and self.options.action == LOG:
            trainer.decide({**_line(step, LOG, finding, loss, norm), "would": finding.what})
            finding = Finding(SKIP) if not math.isfinite(loss) else Finding()
        elif finding.what == SKIP and self.options.action == ACT:
            places = self._blamed(row_losses.tolist(), finding)
            self._refuse(trainer, step, batch, row_losses, places, _line(step, SKIP, finding, loss, norm))
        elif finding.what == CLIP:
            trainer.decide({**_line(step, CLIP, finding, loss, norm), "most_norm": finding.most_norm})
        if finding.what != SKIP and accept(self.known, self.options, step, loss, norm):
            trainer.decide({"kind": KIND, "action": RESTORE_LR, "step": step, "lr_scale": 1.0})
        self.state.anomaly = self.known.to_json()
        return None if finding.what == SKIP else finding.most_norm

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """Raises RollBack, on all ranks, when the ladder has come that far and there is a checkpoint to go back to."""
        if not self._rolls_back or trainer.outcome is not None:  # a run that ends here may go on, and go back, later
            return
        trainer.settle()
        trainer.complete_what_was_begun()  # first, since a save that ends lets older ones go
        refused = f"{len(self.known.alarms)} updates were refused since step {self.known.alarms[0]}"
        target = trainer.engine.mesh.share(rollback_target(self.known, self.options, self._checkpoints()))
        made = self._made()
        if target is None or made >= self.options.most_rollbacks:
            why = "no checkpoint is older" if target is None else f"{made} rollbacks have been made"
            trainer.stop("gate_stop", f"{refused}, and {why}: {self._advice()}")
            return
        self._decide_rollback(trainer, target, refused)
        rows = sum(map(len, self.known.flagged.values()))
        raise RollBack(f"{refused}: back to step {target}, without {rows} rows")

    def _advice(self) -> str:
        if not self.known.losses:
            return "no update was made; where eval.sets are like data.sources look at the data, else set anomaly.action=log"
        if not any(self.known.flagged.values()):
            return "no row is to blame, so the weights are: start anew in another run.dir with a lower optimizer.lr"
        return "look at the rows that the ledger names, lower optimizer.lr, or set anomaly.action=log"

    def _finding(self, loss: float, norm: float) -> Finding:
        if self.options.action == OFF:
            return Finding() if math.isfinite(loss) and math.isfinite(norm) else Finding(SKIP)
        expected = first_losses(self.state.baseline, self.vocab_size)
        finding = judge(self.known, self.options, expected, loss, norm)
        is_idle = finding.what == CLIP and 0 < self.clip_norm <= finding.most_norm
        return Finding() if is_idle else finding

    def _blamed(self, losses: list, finding: Finding) -> list[int]:
        """Places in the batch of the rows that a rollback will do without."""
        if not finding.by_loss:  # the gradient alone does not say whose it was
            return []
        return blamed(losses, median(self.known.losses) if self.known.losses else None)

    def _refuse(
        self, trainer: Trainer, step: int, batch: DrawnBatch, row_losses: Tensor, places: list[int], line: dict
    ) -> None:
        rows = [_described(trainer, ref, *row_losses[place].tolist()) for place, ref in enumerate(batch.refs)]
        for place, row in enumerate(rows):
            row["blamed"] = place in places
        rung = alarm(self.known, self.options, step, [(row["source"], row["row"]) for row in rows if row["blamed"]])
        self.known.skipped_tokens += batch.tokens
        self._rolls_back = rung == ROLL_BACK
        trainer.decide({**line, "tokens": batch.tokens, "rows": rows, "refused_of_late": len(self.known.alarms)})
        if rung == LOWER:
            scale, calm = self.known.lr_scale, self.known.calm_step
            trainer.decide({"kind": KIND, "action": LOWER, "step": step, "lr_scale": scale, "calm_step": calm})

    def _checkpoints(self) -> list[int]:
        """Steps of those that no gate objected to."""
        bad = objected_steps(self.state.gate_history)
        return [step for step in complete_steps(self.run_dir) if step not in bad]

    def _made(self) -> int:
        """Rollbacks by the guard; those by gates have a count of their own."""
        return self.known.rollbacks - Steering.from_json(self.state.steering).rollbacks

    def _decide_rollback(self, trainer: Trainer, target: int, reason: str) -> None:
        exclude = defaultdict(list, self.state.stream.get("excluded", {}))
        for source, rows in self.known.flagged.items():
            exclude[source] = sorted({*exclude[source], *rows})
        what = {"exclude": exclude, "lr_scale": self.options.lr_factor ** (self._made() + 1)}
        calm_step = self.state.step + self.options.cool_down_steps
        trainer.decide(rollback.rollback_line(self.state, target, reason, calm_step=calm_step, **what))


@dataclass
class Decisions:
    """What a ledger's guard decided on the way to where its run ended, by step.

    Attributes:
        skipped: steps whose update was refused.
        most_norms: what gradients were scaled down to.
        lr_scales: ``(step, scale)`` from which on, after the step.
        excluded: rows by source that were excluded after a step.
    """

    skipped: set[int] = field(default_factory=set)
    most_norms: dict[int, float] = field(default_factory=dict)
    lr_scales: list[tuple[int, float]] = field(default_factory=list)
    excluded: dict[int, dict[str, list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[dict]) -> "Decisions":
        """From a ledger's lines. What a later start went behind, by a rollback or without, is not the run's any more."""
        found = cls()
        for line in lines:
            kind = line.get("kind")
            if kind == _SESSION:
                found._forget_after(line["step"])
                found.lr_scales.append((line["step"], line.get("lr_scale", 1.0)))
                found.excluded.setdefault(line["step"], {}).update(line.get("exclude", {}))
            elif kind == KIND:
                found._take(line)
        return found

    def lr_scale_after(self, step: int) -> float:
        """In effect behind a step."""
        return next((scale for at, scale in reversed(self.lr_scales) if at <= step), 1.0)

    def _take(self, line: dict) -> None:
        step, action = line["step"], line["action"]
        if action == SKIP:
            self.skipped.add(step)
        elif action == CLIP:
            self.most_norms[step] = line["most_norm"]
        elif action in (LOWER, RESTORE_LR):
            self.lr_scales.append((step, line["lr_scale"]))

    def _forget_after(self, step: int) -> None:
        self.skipped = {at for at in self.skipped if at <= step}
        self.most_norms = {at: most for at, most in self.most_norms.items() if at <= step}
        self.lr_scales = [(at, scale) for at, scale in self.lr_scales if at <= step]
        self.excluded = {at: rows for at, rows in self.excluded.items() if at <= step}


class ReplayedGuard(AnomalyGuard):
    """Takes the decisions that stand in a ledger, and none of its own.

    Raises InputError for a file that is no ledger.
    """

    def __init__(self, options: AnomalyOptions, state: TrainerState, ledger: Path):
        super().__init__(options, state, 1, ledger.parent)
        lines = read_lines(ledger)
        try:
            self.decisions = Decisions.of(lines)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "anomaly.replay", str(ledger), f"is no ledger ({error!r}); name a run's ledger.jsonl"
            ) from error
        if not any(line.get("kind") == _SESSION for line in lines):
            raise InputError("anomaly.replay", str(ledger), "is no run's ledger; name the ledger.jsonl of a run folder")

    @property
    def lr_scale(self) -> float:
        return self.decisions.lr_scale_after(self.state.step)

    def refusal_is_a_fault(self, step: int) -> bool:
        """What is refused here and was not there is no replay of it."""
        return step not in self.decisions.skipped

    def judge(self, trainer: Trainer, step: int, batch: DrawnBatch, row_losses: Tensor, norm: float) -> float | None:
        if step in self.decisions.skipped:
            self.known.skipped_tokens += batch.tokens
            self.state.anomaly = self.known.to_json()
            trainer.decide({"kind": KIND, "action": SKIP, "step": step, "why": "replayed", "tokens": batch.tokens})
            return None
        return self.decisions.most_norms.get(step, math.inf)

    def on_start(self, trainer: Trainer) -> None:
        self._exclude(trainer)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        self._exclude(trainer)

    def _exclude(self, trainer: Trainer) -> None:
        rows = self.decisions.excluded.get(trainer.state.step)
        if rows:
            trainer.exclude(rollback.applicable(trainer.stream, rows))


def _line(step: int, action: str, finding: Finding, loss: float, norm: float) -> dict:
    numbers = {"loss": finite(loss), "grad_norm": finite(norm)}
    return {"kind": KIND, "action": action, "step": step, "why": finding.why, **numbers}


def _described(trainer: Trainer, ref: RowRef, loss: float, targets: float) -> dict:
    """A row for the ledger: where it is from, its documents, its mean loss."""
    source = trainer.stream.sources[ref.source_index]
    documents = [document for document, _, _ in source.plan.pieces(ref.row)]
    mean = finite(loss / max(targets, 1.0))
    return {"source": source.name, "row": ref.row, "documents": documents, "loss": mean}

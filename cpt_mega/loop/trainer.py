"""The loop: draw rows, step, tell the callbacks. Everything else hangs on it as a callback."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cpt_mega.checkpoint.store import TrainerState
from cpt_mega.config import Config
from cpt_mega.config.schedule import LearningRate
from cpt_mega.data.rows import PackedRow
from cpt_mega.data.stream import MixedStream, RowRef
from cpt_mega.engine.step import Engine, StepResult
from cpt_mega.errors import FaultError


@dataclass(frozen=True)
class StepReport:
    """One step as callbacks see it. Times in seconds; ``tokens`` are the step's real tokens; losses in nats."""

    step: int
    tokens: int
    loss: float
    result: StepResult
    loss_by_source: dict[str, float]
    tokens_by_source: dict[str, int]
    seconds: float
    data_wait_s: float


class Callback(Protocol):
    """What hangs on the loop. Every rank runs every callback, in order; a callback may make collectives."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def on_step(self, trainer: "Trainer", report: StepReport) -> None: ...

    def on_end(self, trainer: "Trainer") -> None: ...


@dataclass
class Trainer:
    """A run from its restored state to its end.

    Attributes:
        state: step, tokens, baseline; written into every checkpoint.
        outcome: ``(state, reason)`` as ``status.json`` names them, once the run is to end.
        save_requested: whether a user asked for a checkpoint at this boundary.
    """

    config: Config
    engine: Engine
    stream: MixedStream | None
    state: TrainerState
    callbacks: Sequence[Callback] = field(default_factory=tuple)
    outcome: tuple[str, str] | None = None
    save_requested: bool = False

    def __post_init__(self):
        self.learning_rate = LearningRate.from_config(self.config)

    @property
    def budget_reached(self) -> bool:
        return self.state.tokens >= self.config.train.tokens

    def stop(self, state: str, reason: str) -> None:
        """Ends the run at this boundary. All ranks must say so together; the first reason stands."""
        self.outcome = self.outcome or (state, reason)

    def run(self) -> tuple[str, str]:
        """Trains until the budget is reached or something stops it; returns ``(state, reason)``.

        Raises FaultError when the loss or the gradient norm is not finite: the last checkpoint is intact.
        """
        for callback in self.callbacks:
            callback.on_start(self)
        while self.outcome is None and not self.budget_reached:
            report = self._step()
            for callback in self.callbacks:
                callback.on_step(self, report)
        self.stop("finished", f"reached {self.state.tokens:,} of {self.config.train.tokens:,} tokens")
        for callback in self.callbacks:
            callback.on_end(self)
        return self.outcome

    def steps_left(self) -> int:
        """Steps until the budget, estimated from the tokens a step has had so far (rows before the first)."""
        rows = self.config.train.global_batch_size
        per_step = self.state.tokens / self.state.step if self.state.step else rows * self.config.train.seq_length
        return math.ceil(max(0, self.config.train.tokens - self.state.tokens) / per_step)

    def _step(self) -> StepReport:
        begin = time.perf_counter()
        refs = self.stream.next_batch(self.config.train.global_batch_size)
        tokens = sum(map(self.stream.row_tokens, refs))
        reader = _TimedReader(self.stream, refs)
        # The rate belongs to where the step ends, so that the first step of a re-warm is not at rate zero.
        lr = self.learning_rate.at(self.state.tokens + tokens)
        result = self.engine.train_step(len(refs), reader, lr)
        self._check_finite(result)
        self.state.step += 1
        self.state.tokens += tokens
        self.state.stream = self.stream.state.to_json()
        loss_by_source = self._loss_by_source(refs, result)
        ledger = {name: source.tokens for name, source in self.stream.state.sources.items()}
        seconds = time.perf_counter() - begin
        return StepReport(self.state.step, tokens, result.loss, result, loss_by_source, ledger, seconds, reader.seconds)

    def _loss_by_source(self, refs: Sequence[RowRef], result: StepResult) -> dict[str, float]:
        """Mean loss (nats) over the real targets of each source that has any in this step."""
        sums: dict[str, list[float]] = {}
        for ref, (loss, targets) in zip(refs, result.row_losses.tolist(), strict=True):
            entry = sums.setdefault(self.stream.sources[ref.source_index].name, [0.0, 0.0])
            entry[0] += loss
            entry[1] += targets
        return {name: loss / targets for name, (loss, targets) in sums.items() if targets}

    def _check_finite(self, result: StepResult) -> None:
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                raise FaultError(
                    f"{name} is {value} at step {self.state.step + 1}: nothing was saved after the last checkpoint; "
                    "lower optimizer.lr, or look at the rows of this step"
                )


class _TimedReader:
    """Reads rows of a drawn batch by position and adds up the seconds the step waited for them."""

    def __init__(self, stream: MixedStream, refs: Sequence[RowRef]):
        self.stream, self.refs, self.seconds = stream, refs, 0.0

    def __call__(self, position: int) -> PackedRow:
        begin = time.perf_counter()
        row = self.stream.read(self.refs[position])
        self.seconds += time.perf_counter() - begin
        return row

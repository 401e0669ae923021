"""The loop: draw rows, step, tell the callbacks. Everything else hangs on it as a callback."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.config import Config
from cpt_mega.config.schedule import LearningRate
from cpt_mega.data.stream import EndOfData, MixedStream, RowRef
from cpt_mega.engine.step import Engine, PendingStep, StepResult
from cpt_mega.errors import FaultError
from cpt_mega.gates.steering import Steering
from cpt_mega.loop.prefetch import DrawnBatch, Prefetcher
from cpt_mega.loop.replay import data_entry


@dataclass(frozen=True)
class StepReport:
    """One step as callbacks see it. Times in seconds; ``real_tokens`` are those that it computed; losses in nats.

    ``total_tokens``, ``tokens_by_source`` and ``epochs_by_source`` are the run's, up to and with this step; tokens that a
    loss mask leaves out are not among them. ``trained_tokens`` are those of ``total_tokens`` whose update was made.
    """

    step: int
    real_tokens: int
    total_tokens: int
    trained_tokens: int
    loss: float
    result: StepResult
    loss_by_source: dict[str, float]
    tokens_by_source: dict[str, int]
    epochs_by_source: dict[str, float]
    seconds: float
    data_wait_s: float


class Callback(Protocol):
    """What hangs on the loop. Every rank runs every callback, in order."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def on_report(self, trainer: "Trainer", report: StepReport) -> None:
        """The numbers of a step. They may come when the next step is under way: look at the report, not at the state.

        No collectives: ranks may settle at different moments.
        """

    def on_boundary(self, trainer: "Trainer", tokens: int) -> None:
        """Between two steps, and collectives may be made here; the last one added ``tokens`` to the ledgers.

        ``trainer.settle`` first, to stop; ``trainer.quiesce``, to save.
        """

    def on_end(self, trainer: "Trainer") -> None: ...

    def on_fault(self, trainer: "Trainer") -> None:
        """A step went wrong, which all ranks know: collectives may be made, and what earlier steps began be completed."""


class Guard(Protocol):
    """Decides about updates before they are made (``loop/guarding.py``)."""

    @property
    def lr_scale(self) -> float:
        """What the schedule's rate is multiplied by in the next step."""

    def refusal_is_a_fault(self, step: int) -> bool:
        """Whether an update that was not made ends the run."""

    def expect_change(self) -> None:
        """The run is about to train on another mixture."""

    def judge(
        self, trainer: "Trainer", step: int, batch: DrawnBatch, row_losses: Tensor, norm: float
    ) -> float | None: ...


@dataclass
class _Launched:
    """A step that has been handed to the device."""

    batch: DrawnBatch
    pending: PendingStep
    step: int
    total_tokens: int
    trained_tokens: int
    wait_s: float
    seconds: float


@dataclass
class Trainer:
    """A run from its restored state to its end.

    Attributes:
        state: step, tokens, baseline; written into every checkpoint.
        guard: judges each update.
        decide: writes a decision to the run's ledger.
        outcome: ``(state, reason)`` as ``status.json`` names them, once the run is to end.
        save_requested: whether a user asked for a checkpoint at this boundary.
    """

    config: Config
    engine: Engine
    stream: MixedStream | None
    state: TrainerState
    guard: Guard
    callbacks: Sequence[Callback] = field(default_factory=tuple)
    decide: Callable[[dict], None] = lambda line: None
    outcome: tuple[str, str] | None = None
    save_requested: bool = False
    _data_ended: str | None = field(default=None, init=False)
    _unsettled: _Launched | None = field(default=None, init=False)
    _batches: Prefetcher | None = field(default=None, init=False)
    _known_steering: tuple[dict, Steering] | None = field(default=None, init=False)

    def __post_init__(self):
        self.learning_rate = LearningRate.from_config(self.config)

    @property
    def budget(self) -> int:
        """Tokens that the run ends at: ``train.tokens``, or earlier where a gate anneals it."""
        return int(min(self.config.train.tokens, self._steering.ends_at))

    @property
    def _steering(self) -> Steering:
        """Asked several times a step; whoever changes it puts another one in its place."""
        if self._known_steering is None or self._known_steering[0] is not self.state.steering:
            self._known_steering = (self.state.steering, Steering.from_json(self.state.steering))
        return self._known_steering[1]

    @property
    def budget_reached(self) -> bool:
        return self.state.tokens >= self.budget

    @property
    def ends_here(self) -> bool:
        """Whether no step comes after this boundary: the budget is reached, or the data have come to their end."""
        return self.budget_reached or self._data_ended is not None

    def stop(self, state: str, reason: str) -> None:
        """Ends the run at this boundary. All ranks must say so together; the first reason stands."""
        self.outcome = self.outcome or (state, reason)

    def run(self) -> tuple[str, str]:
        """Trains until the budget is reached or something stops it; returns ``(state, reason)``.

        Raises FaultError when the loss or the gradient norm is not finite and the guard has nothing to say: the last
        checkpoint is intact. Raises RollBack when the guard wants the run to go on from an earlier one.
        """
        for callback in self.callbacks:
            callback.on_start(self)
        if self.outcome is None and not self.budget_reached:
            with Prefetcher(self.stream, self.engine.prepare, self.config.train.global_batch_size) as batches:
                self._train(batches)
        reached = f"reached {self.state.tokens:,} of {self.config.train.tokens:,} tokens"
        reached += ", annealed by a gate" if self._steering.anneal_from is not None else ""
        self.stop("finished", f"{reached}: {self._data_ended}" if self._data_ended else reached)
        for callback in self.callbacks:
            callback.on_end(self)
        return self.outcome

    def settle(self) -> None:
        """Waits for the numbers of the last step and reports them: before anything is judged or saved.

        Raises FaultError when they are not finite.
        """
        launched, self._unsettled = self._unsettled, None
        if launched is None:
            return
        begin = time.perf_counter()
        result = launched.pending.wait()
        if result.refused and self.guard.refusal_is_a_fault(launched.step):
            self.complete_what_was_begun()
            raise FaultError(_not_finite(launched.step, result))
        report = StepReport(
            launched.step,
            launched.batch.real_tokens,
            launched.total_tokens,
            launched.trained_tokens,
            result.loss,
            result,
            self._loss_by_source(launched.batch.refs, result),
            launched.batch.tokens_by_source,
            launched.batch.epochs_by_source,
            launched.seconds + time.perf_counter() - begin,
            launched.wait_s,
        )
        for callback in self.callbacks:
            callback.on_report(self, report)

    def reweight(self, weights: Mapping[str, float], why: Mapping[str, object]) -> None:
        """Lets other shares of tokens take effect with the next step, until they are changed again or the run ends.

        For gates and other callbacks, at a boundary and before ``Checkpoints``; all ranks must do so together. No row is
        repeated or skipped: the batch that was read ahead is drawn anew. The decision and ``why`` go to the ledger, and the
        data state has it from then on, so a continued run has it too. Raises InputError as ``MixedStream.reweight`` does;
        nothing is changed then.
        """
        self.state.stream = self._batches.redraw(self.state.stream, lambda stream: stream.reweight(weights))
        self.guard.expect_change()
        self.decide(
            {"kind": "weights", "step": self.state.step, "tokens": self.state.tokens, "weights": weights, **why}
        )
        self._record_data_state()

    def exclude(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Steps past rows of sources from the next step on; at the start or a boundary, on all ranks. Raises as the stream."""
        if self._batches is None:
            self.stream.exclude(rows)
            self.state.stream = self.stream.state.to_json()
        else:
            self.state.stream = self._batches.redraw(self.state.stream, lambda stream: stream.exclude(rows))
        self._record_data_state()

    def complete_what_was_begun(self) -> None:
        """A step went wrong: saves that earlier steps began come to their end. A collective."""
        for callback in self.callbacks:
            callback.on_fault(self)

    def _record_data_state(self) -> None:
        """Where the order is set anew, the ledger says from what: between such places it follows from the cursors alone."""
        state = self.state
        self.decide(data_entry(self.config, self.stream.sources, state.lineage["corpora"], state.step, state.stream))

    def quiesce(self) -> None:
        """Settles, and waits until the thread that reads ahead is at rest: core forks when it saves, and a lock that a
        thread holds at that moment would stay locked in the child."""
        self.settle()
        if self._batches is not None:
            self._batches.rest()

    def steps_left(self, step: int, tokens: int) -> int:
        """Steps from there to the budget, estimated from the tokens a step has had so far (rows before the first)."""
        rows = self.config.train.global_batch_size
        per_step = tokens / step if tokens else rows * self.config.train.seq_length
        return math.ceil(max(0, self.budget - tokens) / per_step)

    def _train(self, batches: Prefetcher) -> None:
        self._batches = batches
        try:
            while self.outcome is None and not self.ends_here:
                try:
                    launched = self._launch(batches)
                except EndOfData as end:
                    self._data_ended = str(end)
                    self._at_boundary(0)
                    break
                self.settle()  # the step before, while this one is under way
                self._unsettled = launched
                self._at_boundary(launched.batch.tokens)
            self.settle()
        except Exception as error:
            self._settle_after(error)
            raise
        finally:
            self._batches = None  # nothing is read ahead any more

    def _at_boundary(self, tokens: int) -> None:
        for callback in self.callbacks:
            callback.on_boundary(self, tokens)

    def _settle_after(self, error: Exception) -> None:
        """The last finished step is still reported; if its numbers were not finite, that is what went wrong first."""
        try:
            self.settle()
        except FaultError as earlier:
            raise earlier from error
        except Exception:  # a device that has failed has no numbers
            return

    def _launch(self, batches: Prefetcher) -> _Launched:
        begin = time.perf_counter()
        batch = batches.next()
        waited = time.perf_counter() - begin
        # The rate belongs to where the step ends, so that the first step of a re-warm is not at rate zero.
        end = self.state.tokens + batch.tokens
        at, scale = partial(self.learning_rate.at, end), self.guard.lr_scale * self._steering.rate(end)
        judge = partial(self.guard.judge, self, self.state.step + 1, batch)
        pending = self.engine.train_step(batch.prepared, lambda peak, floor: scale * at(peak, floor), judge)
        self.state.step += 1
        self.state.tokens += batch.tokens
        self.state.stream = batch.stream_state
        for hit in batch.hits:
            self.decide({"kind": "odd_row", "step": self.state.step, **asdict(hit)})
        for name in batch.dropped:
            self.decide({"kind": "weights", "step": self.state.step, "by": "data.max_epochs", "dropped": name})
        if batch.dropped:
            self._record_data_state()
            self.guard.expect_change()
        seconds = time.perf_counter() - begin
        trained = self.state.tokens - self.state.anomaly.get("skipped_tokens", 0)
        return _Launched(batch, pending, self.state.step, self.state.tokens, trained, waited, seconds)

    def _loss_by_source(self, refs: Sequence[RowRef], result: StepResult) -> dict[str, float]:
        """Mean loss (nats) over the real targets of each source that has any in this step."""
        sums: dict[str, list[float]] = {}
        for ref, (loss, targets) in zip(refs, result.row_losses.tolist(), strict=True):
            entry = sums.setdefault(self.stream.sources[ref.source_index].name, [0.0, 0.0])
            entry[0] += loss
            entry[1] += targets
        return {name: loss / targets for name, (loss, targets) in sums.items() if targets}


def _not_finite(step: int, result: StepResult) -> str:
    name, value = ("gradient norm", result.grad_norm) if math.isfinite(result.loss) else ("loss", result.loss)
    return (
        f"{name} is {value} at step {step}: nothing was saved after the last checkpoint; "
        "lower optimizer.lr, or look at the rows of this step"
    )
    return None

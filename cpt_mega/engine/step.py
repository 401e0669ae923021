"""The step: rows in, one optimizer update or one evaluation out, under core's own schedules at any layout.

A step waits for the device where core does too, for the gradient norm (in 0.16 also where it counts tokens), and once more for
all ranks to agree on it: the losses are reduced meanwhile and are there by then, so that an update is judged before it is made.
Batches lie in pinned memory, and what a step took is asked for when the next one is under way (``PendingStep``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cpt_mega.config.schema import Config
from cpt_mega.engine.batch import ContextPart, MicroBatch, Row, filled_tokens
from cpt_mega.engine.dealing import deal_rows
from cpt_mega.engine.fast_paths import FastPath, fast_paths
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.model import build_chunks, wrap_for_scoring, wrap_for_training
from cpt_mega.engine.optimizer import build_optimizer, gradient_norm, set_learning_rate, update
from cpt_mega.engine.precision import token_multiple
from cpt_mega.engine.timing import PhaseClock
from cpt_mega.hf.shape import ModelShape


@dataclass(frozen=True)
class StepResult:
    """Numbers of one update.

    Attributes:
        row_losses: float64 [rows, 2], for each row of the global batch the sum of its losses (nats) and its real targets.
        grad_norm: before clipping.
        refused: whether no update was made: weights, moments and their step count are what they were.
        lr: of the parameters that have no rate of their own.
        own_s: seconds until this rank's gradients were ready to be reduced.
        forward_backward_s, optimizer_s: seconds on the device; own_s is a part of the former.
    """

    row_losses: Tensor
    grad_norm: float
    refused: bool
    lr: float
    own_s: float
    forward_backward_s: float
    optimizer_s: float

    @property
    def loss(self) -> float:
        """Mean loss over the real target tokens of the global batch, nats; 0 when there are none."""
        return mean_loss(self.row_losses)


def mean_loss(row_losses: Tensor) -> float:
    """Nats over all targets of rows, from their sums and numbers [rows, 2]; 0 where there are none."""
    total, targets = row_losses.sum(dim=0).tolist()
    return total / max(targets, 1.0)


# What allows an update: given [rows, 2] of the whole batch and the gradient norm, which are the same on all ranks, the largest
# norm that the gradient may have, or None to refuse the update.
Judge = Callable[[Tensor, float], float | None]


def make_every_update(row_losses: Tensor, grad_norm: float) -> float:
    """A judge that leaves every gradient as it is."""
    return math.inf


@dataclass(frozen=True)
class PreparedBatch:
    """What this rank computes of a batch of ``count`` rows: for each micro-batch, its rows' indices and their tokens."""

    count: int
    places: list[list[int]]
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class PendingStep:
    """An update that the device may still be at."""

    losses: Tensor
    grad_norm: float
    refused: bool
    lr: float
    clock: PhaseClock

    def wait(self) -> StepResult:
        """The numbers, once they are there."""
        own, reduction, optimizer = self.clock.seconds()
        return StepResult(self.losses, self.grad_norm, self.refused, self.lr, own, own + reduction, optimizer)


class Engine:
    """A model on a mesh, with an optimizer when it trains.

    All ranks call each method with the rows of the whole batch it names; which rows a rank computes is decided here.
    Rows passed to one call have one length S.
    """

    def __init__(self, config: Config, shape: ModelShape, mesh: Mesh, train: bool = True):
        self.config, self.shape, self.mesh = config, shape, mesh
        self.core_chunks = build_chunks(config, shape, mesh)
        clocks: list[
            PhaseClock
        ] = []  # of the step under way; core must not hold the engine, which would never be freed
        self._clocks = clocks
        self.chunks = (
            wrap_for_training(self.core_chunks, config, lambda: clocks[-1].mark())
            if train
            else wrap_for_scoring(self.core_chunks)
        )
        self.optimizer = build_optimizer(self.chunks, config) if train else None
        multiple = token_multiple(config.precision) * (mesh.tp if config.parallel.sp else 1)
        self._part = ContextPart(mesh.cp, mesh.groups.cp.rank(), multiple)
        self._run_schedule = get_forward_backward_func()
        self._gathers_late = train and self.chunks[0].ddp_config.overlap_param_gather
        self._side = torch.cuda.Stream()
        self.gather_parameters()

    def my_rows(self, count: int, work: Sequence[float] | None = None) -> list[list[int]]:
        """Indices into a batch of ``count`` rows that this data-parallel rank computes, a list a micro-batch.

        Every micro-batch has ``train.micro_batch_size`` of them, because stages exchange tensors of one shape: where an
        evaluation does not fill the last one, its last row is computed again, with the same result.
        ``work``, of each row of a batch that fills all micro-batches, lets ranks have the same to do.
        """
        size, dp, me = self.config.train.micro_batch_size, self.mesh.dp, self.mesh.dp_rank
        if work is not None:
            return self._whole_rounds(deal_rows(work, dp, size)[me])
        groups = (list(range(start, min(start + size, count))) for start in range(me * size, count, dp * size))
        return self._whole_rounds([group + group[-1:] * (size - len(group)) for group in groups])

    def prepare(self, count: int, read: Callable[[int], Row], work: Sequence[float] | None = None) -> PreparedBatch:
        """Reads this rank's rows of a batch; ``read(i)`` gives row i, ``work`` is as in ``my_rows``.

        Touches no device, so another thread may call it.
        """
        places = self.my_rows(count, work)
        return PreparedBatch(count, places, self._micro_batches([[read(i) for i in indices] for indices in places]))

    def train_step(
        self, batch: PreparedBatch, rate: Callable[[float, float], float], judge: Judge = make_every_update
    ) -> PendingStep:
        """One optimizer update over a global batch, under the learning rate that ``rate(peak, floor)`` gives.

        The loss is the mean over the real targets of the whole batch: core sums losses and counts, reduces both, and
        divides once (``calculate_per_token_loss``). An update that ``judge`` refuses, or whose gradient norm is not finite, is
        not made at all: multiplying it by zero would be no guard, since 0 times NaN is NaN.
        """
        clock = PhaseClock()
        self._clocks[:] = [clock]
        self._set_training(True)
        self._gather_while_computing()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = set_learning_rate(self.optimizer, self.config, rate)
        reduced = self._reduced(self._losses(batch, forward_only=False))
        clock.mark()
        norm = self._agreed(gradient_norm(self.optimizer))
        losses = reduced.wait()
        most = judge(losses, norm)
        refused = most is None or not math.isfinite(norm)
        if not refused:
            update(self.optimizer, norm, most)
        clock.mark()
        return PendingStep(losses, norm, refused, lr, clock)

    def evaluate(self, count: int, read: Callable[[int], Row]) -> Tensor:
        """[rows, 2]: summed loss (nats) and real targets of each row, without gradients and without touching any state."""
        with self._evaluating():
            losses = self._losses(self.prepare(count, read), forward_only=True)
        return self._reduced(losses).wait()

    def prepare_each(self, rows: Sequence[Row]) -> PreparedBatch:
        """Rows of this rank's own choice, one a micro-batch: the other data-parallel ranks may have others."""
        places = self._whole_rounds([[index] for index in range(len(rows))])
        return PreparedBatch(len(rows), places, self._micro_batches([[rows[index] for index in one] for one in places]))

    def forward_logits(self, batch: PreparedBatch, consume: Callable[[Tensor, MicroBatch, list[int]], object]) -> list:
        """Runs micro-batches without gradients and without touching any state.

        ``consume`` sees the last stage's logits [1, t, padded_vocab / tp], their micro-batch and the places of its rows.
        Returns what it returned for each micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def forward(iterator: Iterator[tuple[MicroBatch, list[int]]], model):
            rows, places = next(iterator)
            rows = rows.to(self.mesh.device)
            logits = model(rows.ids, None, None, packed_seq_params=rows.packed_params())
            return logits, lambda output, non_loss_data=True: consume(output, rows, places)

        with self._evaluating():
            return self._schedule(
                forward, batch.micro_batches, batch.places, forward_only=True, collect_non_loss_data=True
            )

    def fast_paths(self) -> list[FastPath]:
        """Which fast ways this engine takes. For one that trains."""
        return fast_paths(self.config, self.core_chunks[0].config, self.chunks[0].ddp_config)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a weight as the model computes with it."""
        return next(self.core_chunks[0].parameters()).element_size()

    def gather_parameters(self) -> None:
        """Makes every rank hold the parameters of the last update: before they are read other than by a training step."""
        if self._gathers_late and self.chunks[0].remove_forward_pre_hook_handles:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook()

    def _gather_while_computing(self) -> None:
        if self._gathers_late and not self.chunks[0].remove_forward_pre_hook_handles:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients, no dropout; afterwards all is as it was."""
        self.gather_parameters()
        was_training = self.chunks[0].training
        self._set_training(False)
        with torch.no_grad():
            yield
        self._set_training(was_training)

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    def _whole_rounds(self, batches: list) -> list:
        """Interleaved stages take micro-batches in rounds of as many as there are stages: the last one again."""
        missing = -len(batches) % self.mesh.pp if self.config.parallel.vpp > 1 and batches else 0
        return batches + batches[-1:] * missing

    def _micro_batches(self, groups: list[list[Row]]) -> list[MicroBatch]:
        """Micro-batches of one size: stages exchange tensors of one shape."""
        tokens = max((filled_tokens(rows, self._part) for rows in groups), default=None)
        return [MicroBatch.of(rows, self._part, tokens) for rows in groups]

    def _losses(self, batch: PreparedBatch, forward_only: bool) -> Tensor:
        """[rows, 2]: what this rank adds to the batch's losses and targets."""
        forward = partial(_forward_with_loss, self.mesh.device)
        found = self._schedule(forward, batch.micro_batches, forward_only=forward_only)
        losses = torch.zeros(batch.count, 2, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.groups.tp.rank() == 0:  # its peers have the same
            for indices, rows in zip(batch.places, found, strict=False):
                for index, row in zip(indices, rows["rows"], strict=True):
                    losses[index] = row  # a list of indices would have to travel to the device first
        return losses

    def _schedule(self, forward: Callable, batches: list[MicroBatch], *beside: list, **options) -> list:
        """Core's schedule; ``forward`` is given an iterator of micro-batches, with what is ``beside`` each of them."""
        if not batches:
            return []
        iterators = [zip(batches, *beside, strict=True) if beside else iter(batches) for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        return self._run_schedule(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens,
            micro_batch_size=1,  # a packed micro-batch is one row of T tokens
            **options,
        )

    def _agreed(self, norm: float) -> float:
        """The largest of all ranks: replicas that differ in a bit must not part over an update."""
        value = torch.tensor([norm if math.isfinite(norm) else math.inf], dtype=torch.float64, device=self.mesh.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.item()

    def _reduced(self, losses: Tensor) -> "_Reduced":
        return _Reduced(losses, self._side)


class _Reduced:
    """Losses summed over all ranks, on their way to the host beside the device's other work.

    Each row has one owner (several, of a part each, under context parallelism); what others add is zero.
    """

    def __init__(self, losses: Tensor, side: torch.cuda.Stream):
        work = dist.all_reduce(losses, async_op=True)
        with torch.cuda.stream(side):
            work.wait()
            losses.record_stream(side)
            self._host = torch.empty(losses.shape, dtype=losses.dtype, device="cpu", pin_memory=True)
            self._host.copy_(losses, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(side)

    def wait(self) -> Tensor:
        self._done.synchronize()
        return self._host


def _forward_with_loss(device: torch.device, iterator: Iterator[MicroBatch], model):
    """Core's forward_step_func: the per-token losses [1, t] on the last stage, hidden states elsewhere."""
    batch = next(iterator).to(device)
    output = model(batch.ids, None, None, labels=batch.labels, packed_seq_params=batch.packed_params())
    return output, partial(_sum_of_losses, batch)


def _sum_of_losses(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the real targets' losses, their number, and both for each row ([rows, 2], float64)."""
    masked = losses.float() * batch.mask
    by_row = torch.stack(
        [_row_sums(x.detach().double().view(-1), batch.row_tokens) for x in (masked, batch.mask)], dim=1
    )
    return masked.sum(), batch.mask.sum().to(torch.int), {"rows": by_row}


def _row_sums(values: Tensor, row_tokens: Sequence[int]) -> Tensor:
    return torch.stack([row.sum() for row in values.split(list(row_tokens))])

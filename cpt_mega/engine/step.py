"""The step: rows in, one optimizer update or one evaluation out, under core's own schedules at any layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cpt_mega.config.schema import Config
from cpt_mega.engine.batch import ContextPart, MicroBatch, Row, filled_tokens
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.model import build_chunks, wrap_for_scoring, wrap_for_training
from cpt_mega.engine.optimizer import build_optimizer, set_learning_rate
from cpt_mega.hf.shape import ModelShape


@dataclass(frozen=True)
class StepResult:
    """``row_losses``: [rows, 2], for each row of the global batch the sum of its losses (nats) and its real targets."""

    row_losses: Tensor
    grad_norm: float
    lr: float

    @property
    def loss(self) -> float:
        """Mean loss over the real target tokens of the global batch, nats; 0 when there are none."""
        total, targets = self.row_losses.sum(dim=0).tolist()
        return total / max(targets, 1.0)


class Engine:
    """A model on a mesh, with an optimizer when it trains.

    All ranks call each method with the rows of the whole batch it names; which rows a rank computes is decided here.
    Rows passed to one call have one length S, a multiple of the tensor-parallel size under sequence parallelism.
    """

    def __init__(self, config: Config, shape: ModelShape, mesh: Mesh, train: bool = True):
        self.config, self.shape, self.mesh = config, shape, mesh
        self.core_chunks = build_chunks(config, shape, mesh)
        self.chunks = wrap_for_training(self.core_chunks, config) if train else wrap_for_scoring(self.core_chunks)
        self.optimizer = build_optimizer(self.chunks, config) if train else None
        self._part = ContextPart(mesh.cp, mesh.groups.cp.rank(), mesh.tp if config.parallel.sp else 1)
        self._run_schedule = get_forward_backward_func()

    def my_rows(self, count: int) -> list[list[int]]:
        """Indices into a batch of ``count`` rows that this data-parallel rank computes, a list a micro-batch.

        Every micro-batch has ``train.micro_batch_size`` of them, because stages exchange tensors of one shape: where an
        evaluation does not fill the last one, its last row is computed again, with the same result.
        """
        size, dp, me = self.config.train.micro_batch_size, self.mesh.dp, self.mesh.dp_rank
        groups = (list(range(start, min(start + size, count))) for start in range(me * size, count, dp * size))
        return self._whole_rounds([group + group[-1:] * (size - len(group)) for group in groups])

    def _whole_rounds(self, batches: list) -> list:
        """Interleaved stages take micro-batches in rounds of as many as there are stages: the last one again."""
        missing = -len(batches) % self.mesh.pp if self.config.parallel.vpp > 1 and batches else 0
        return batches + batches[-1:] * missing

    def train_step(self, count: int, read: Callable[[int], Row], lr: float) -> StepResult:
        """One optimizer update over a global batch of ``count`` rows; ``read(i)`` gives row i where it is needed.

        The loss is the mean over the real targets of the whole batch: core sums losses and counts, reduces both, and
        divides once (``calculate_per_token_loss``).
        """
        self._set_training(True)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, lr, self.config.optimizer.weight_decay)
        losses = self._losses(count, read, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(losses, float(grad_norm or 0.0), lr)

    def evaluate(self, count: int, read: Callable[[int], Row]) -> Tensor:
        """[rows, 2]: summed loss (nats) and real targets of each row, without gradients and without touching any state."""
        was_training = self.chunks[0].training
        self._set_training(False)
        with torch.no_grad():
            losses = self._losses(count, read, forward_only=True)
        self._set_training(was_training)
        return losses

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    def forward_logits(self, rows: Sequence[Row], consume: Callable[[Tensor, MicroBatch], object]) -> list:
        """Runs rows one micro-batch each; ``consume`` sees the last stage's logits [1, t, padded_vocab / tp] and its batch.

        Returns what ``consume`` returned for each row on the last pipeline stage, an empty list elsewhere.
        """
        batches = self._whole_rounds(self._batches([[row] for row in rows]))

        def forward(iterator: Iterator[MicroBatch], model):
            batch = next(iterator)
            logits = model(batch.ids, None, None, packed_seq_params=batch.packed_params())
            return logits, lambda output, non_loss_data=True: consume(output, batch)

        with torch.no_grad():
            return self._schedule(forward, batches, forward_only=True, collect_non_loss_data=True)[: len(rows)]

    def _batches(self, groups: list[list[Row]]) -> list[MicroBatch]:
        """Micro-batches of one size: stages exchange tensors of one shape."""
        tokens = max((filled_tokens(rows, self._part) for rows in groups), default=None)
        return [MicroBatch.of(rows, self.mesh.device, self._part, tokens) for rows in groups]

    def _losses(self, count: int, read: Callable[[int], Row], forward_only: bool) -> Tensor:
        places = self.my_rows(count)
        batches = self._batches([[read(i) for i in indices] for indices in places])
        found = self._schedule(_forward_with_loss, batches, forward_only=forward_only)
        losses = torch.zeros(count, 2, dtype=torch.float64, device=self.mesh.device)
        for indices, rows in zip(places, found, strict=False):
            losses[indices] = rows["rows"]
        return self._reduced(losses)

    def _schedule(self, forward: Callable, batches: list[MicroBatch], **options) -> list:
        if not batches:
            return []
        iterators = [iter(batches) for _ in self.chunks]
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

    def _reduced(self, losses: Tensor) -> Tensor:
        """Rows of all data-parallel ranks, on every rank; each row has one owner or, context-parallel, several parts."""
        dist.all_reduce(losses, group=self.mesh.groups.dp_cp)
        if self.mesh.pp > 1:
            last = dist.get_process_group_ranks(self.mesh.groups.pp)[-1]
            dist.broadcast(losses, src=last, group=self.mesh.groups.pp)
        return losses


def _forward_with_loss(iterator: Iterator[MicroBatch], model):
    """Core's forward_step_func: the per-token losses [1, T] on the last stage, hidden states elsewhere."""
    batch = next(iterator)
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

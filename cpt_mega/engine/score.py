"""Log-probabilities of packed rows by the forward pass that training uses, from logits split over the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cpt_mega.engine.batch import MicroBatch, Row
from cpt_mega.engine.context import FILLING
from cpt_mega.engine.step import Engine

TOP = 5


@dataclass(frozen=True)
class RowScores:
    """logprobs [T]: of each position's *next* token, its label; top_ids and top_logprobs [T, 5]: the likeliest next ones."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def score_rows(engine: Engine, rows: Sequence[Row]) -> list[RowScores]:
    """Scores of rows of one length, on the last pipeline stage (every tensor- and context-parallel rank); an empty list
    elsewhere."""
    return engine.forward_logits(rows, lambda logits, batch: _whole(engine, _scores(engine, logits, batch), batch))


def _scores(engine: Engine, logits: Tensor, batch: MicroBatch) -> RowScores:
    group, tp = engine.mesh.groups.tp, engine.mesh.tp
    local = logits.float().squeeze(0)  # [T, padded_vocab / tp]
    first = group.rank() * local.size(1)
    log_total = _log_sum_exp(local, group)
    labels = batch.labels.squeeze(0) - first
    mine = (labels >= 0) & (labels < local.size(1))
    picked = local.gather(1, labels.clamp(0, local.size(1) - 1).unsqueeze(1)).squeeze(1)
    label_logits = torch.where(mine, picked, torch.zeros_like(picked))
    dist.all_reduce(label_logits, group=group)
    values, ids = local.topk(min(TOP, local.size(1)), dim=1)
    all_values, all_ids = _gathered(values, tp, group), _gathered(ids + first, tp, group)
    best, places = all_values.topk(min(TOP, engine.shape.vocab_size), dim=1)
    return RowScores(label_logits - log_total, all_ids.gather(1, places), best - log_total.unsqueeze(1))


def _whole(engine: Engine, part: RowScores, batch: MicroBatch) -> RowScores:
    """The scores of all context-parallel ranks in the order of the row; filling is left out."""
    group, size = engine.mesh.groups.cp, engine.mesh.cp
    if size == 1:
        return part
    places = torch.from_numpy(batch.positions).to(part.logprobs.device)
    positions = _gathered(places, size, group, dim=0)
    order = positions.argsort()[int((positions == FILLING).sum()) :]
    logprobs, ids, values = (
        _gathered(x, size, group, dim=0)[order] for x in (part.logprobs, part.top_ids, part.top_logprobs)
    )
    return RowScores(logprobs, ids, values)


def _log_sum_exp(local: Tensor, group) -> Tensor:
    """[T, v] split over a group to the [T] log of the sum of exponentials over the whole vocabulary."""
    largest = local.max(dim=1).values
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (local - largest.unsqueeze(1)).exp().sum(dim=1)
    dist.all_reduce(total, group=group)
    return largest + total.log()


def _gathered(part: Tensor, size: int, group, dim: int = 1) -> Tensor:
    """The parts of all ranks joined along one axis, in rank order."""
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)

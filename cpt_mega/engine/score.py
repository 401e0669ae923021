"""Log-probabilities of packed rows by the forward pass that training uses, from logits split over the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpt_mega.engine.batch import MicroBatch, Row
from cpt_mega.engine.context import FILLING
from cpt_mega.engine.step import Engine

TOP = 5
UNCOUNTED = -1  # the group of a target that none counts


@dataclass(frozen=True)
class RowScores:
    """logprobs [T]: of each position's *next* token, its label; top_ids and top_logprobs [T, 5]: the likeliest next ones."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def score_rows(engine: Engine, rows: Sequence[Row]) -> list[RowScores]:
    """Scores of rows of one length, on the last pipeline stage (every tensor- and context-parallel rank); an empty list
    elsewhere."""

    def consume(logits: Tensor, batch: MicroBatch, places: list[int]) -> RowScores:
        return _whole(engine, _scores(engine, logits, batch), batch)

    return engine.forward_logits(engine.prepare_each(rows), consume)[: len(rows)]


class GroupedRow(Row, Protocol):
    """A packed row of S tokens whose targets are summed in groups.

    ``groups``: int64 [S], which group the target of each position counts for; UNCOUNTED for none.
    """

    groups: np.ndarray


def score_groups(engine: Engine, rows: Sequence[GroupedRow], groups: int) -> Tensor:
    """Log-probabilities of targets, summed by group; rows of one length S. A collective: all ranks pass the same rows.

    Returns float64 [groups, 3] on every rank: the sum of the targets' log-probabilities (nats), how many of them were the
    likeliest token (a tie counts), and how many there are.
    """
    found = torch.zeros(groups, 3, dtype=torch.float64, device=engine.mesh.device)
    batch = engine.prepare(len(rows), rows.__getitem__)
    done: set[int] = set()  # the last row may come again to fill a micro-batch or a round

    def consume(logits: Tensor, micro_batch: MicroBatch, places: list[int]) -> None:
        owners = [rows[place].groups if place not in done | set(places[:i]) else None for i, place in enumerate(places)]
        done.update(places)
        _add_targets(engine, found, logits, micro_batch, _here(owners, len(rows[0].groups), micro_batch))

    engine.forward_logits(batch, consume)
    dist.all_reduce(found)
    return found.cpu()


def _here(owners: Sequence[np.ndarray | None], length: int, micro_batch: MicroBatch) -> np.ndarray:
    """The groups of this rank's part of a micro-batch, int64 [t]."""
    nobody = np.full(length, UNCOUNTED, np.int64)
    whole = np.concatenate([nobody if owner is None else owner for owner in owners])
    return np.where(micro_batch.positions == FILLING, UNCOUNTED, whole[micro_batch.positions])


def _add_targets(engine: Engine, found: Tensor, logits: Tensor, micro_batch: MicroBatch, groups: np.ndarray) -> None:
    """Adds a micro-batch's targets to ``found`` on one tensor-parallel rank; its peers have the same."""
    counted = np.flatnonzero(groups != UNCOUNTED)
    places = torch.from_numpy(counted).to(logits.device)
    local = logits.squeeze(0)[places].float()  # of those that count alone: whole rows of logits in fp32 are large
    labels = micro_batch.labels.squeeze(0)[places]
    logprobs, is_likeliest = _of_labels(engine, local, labels)
    if engine.mesh.groups.tp.rank() == 0:
        values = torch.stack([logprobs.double(), is_likeliest.double(), torch.ones_like(logprobs).double()], dim=1)
        found.index_add_(0, torch.from_numpy(groups[counted]).to(logits.device), values)


def _of_labels(engine: Engine, local: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[n] log-probabilities of labels, and whether each is the likeliest token, from fp32 logits [n, padded_vocab / tp]."""
    label_logits = _picked(engine, local, labels)
    log_total, largest = _log_sum_exp(local, engine.mesh.groups.tp)
    return label_logits - log_total, label_logits >= largest


def _picked(engine: Engine, local: Tensor, ids: Tensor) -> Tensor:
    """[n] logits of ids of the whole vocabulary, wherever they lie."""
    group = engine.mesh.groups.tp
    places = ids - group.rank() * local.size(1)
    mine = (places >= 0) & (places < local.size(1))
    picked = local.gather(1, places.clamp(0, local.size(1) - 1).unsqueeze(1)).squeeze(1)
    picked = torch.where(mine, picked, torch.zeros_like(picked))
    dist.all_reduce(picked, group=group)
    return picked


def _scores(engine: Engine, logits: Tensor, batch: MicroBatch) -> RowScores:
    group, tp = engine.mesh.groups.tp, engine.mesh.tp
    local = logits.float().squeeze(0)  # [T, padded_vocab / tp]
    first = group.rank() * local.size(1)
    label_logits = _picked(engine, local, batch.labels.squeeze(0))
    log_total, _ = _log_sum_exp(local, group)
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


def _log_sum_exp(local: Tensor, group) -> tuple[Tensor, Tensor]:
    """Of [T, v] split over a group, the [T] log of the sum of exponentials over the whole vocabulary, and the [T] largest."""
    largest = local.max(dim=1).values
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (local - largest.unsqueeze(1)).exp().sum(dim=1)
    dist.all_reduce(total, group=group)
    return largest + total.log(), largest


def _gathered(part: Tensor, size: int, group, dim: int = 1) -> Tensor:
    """The parts of all ranks joined along one axis, in rank order."""
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)

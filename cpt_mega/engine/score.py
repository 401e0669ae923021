"""Log-probabilities of packed rows by the forward pass that training uses, from logits split over the vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpt_mega.engine.batch import MicroBatch, Row
from cpt_mega.engine.context import FILLING
from cpt_mega.engine.step import Engine, PreparedBatch

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

    ``groups``: int64 [S], which group the target of each position counts for; UNCOUNTED for none. ``others``: further targets,
    position, token id and group of each: what else might stand behind a position.
    """

    groups: np.ndarray
    others: Sequence[tuple[int, int, int]]


def score_groups(engine: Engine, rows: Sequence[GroupedRow], groups: int) -> Tensor:
    """Log-probabilities of targets, summed by group; rows of one length S. A collective: all ranks pass the same rows.

    Returns float64 [groups, 3] on every rank: the sum of the targets' log-probabilities (nats), how many of them were the
    likeliest token (a tie counts), and how many there are.
    """
    found = torch.zeros(groups, 3, dtype=torch.float64, device=engine.mesh.device)

    def add(local: Tensor, labels: Tensor, owners: Tensor) -> None:
        logprobs, is_likeliest = _of_labels(engine, local, labels)
        if _speaks(engine):
            values = torch.stack([logprobs.double(), is_likeliest.double(), torch.ones_like(logprobs).double()], dim=1)
            found.index_add_(0, owners, values)

    _visit_targets(engine, rows, add)
    dist.all_reduce(found)
    return found.cpu()


def likeliest_of_targets(engine: Engine, rows: Sequence[GroupedRow], targets: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens where each target stands. Rows as ``score_groups`` takes them, each target a group.

    Returns ids int64 and log-probabilities float64, [targets, count], likeliest first, on every rank. A collective.
    """
    ids = torch.zeros(targets, count, dtype=torch.int64, device=engine.mesh.device)
    logprobs = torch.zeros(targets, count, dtype=torch.float64, device=engine.mesh.device)

    def add(local: Tensor, labels: Tensor, owners: Tensor) -> None:
        log_total, _ = _log_sum_exp(local, engine.mesh.groups.tp)
        best, values = _likeliest(engine, local, count)
        if _speaks(engine):
            ids[owners], logprobs[owners] = best, (values - log_total.unsqueeze(1)).double()

    _visit_targets(engine, rows, add)
    for found in (ids, logprobs):
        dist.all_reduce(found)
    return ids.cpu(), logprobs.cpu()


def logprobs_at_targets(engine: Engine, rows: Sequence[GroupedRow], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens where each target stands. Rows as ``likeliest_of_targets`` takes them.

    Args:
        ids: int64 [targets, count].

    Returns float64 [targets, count], and [targets] of the least likely token of all, on every rank. A collective.
    """
    ids = ids.to(engine.mesh.device)
    found = torch.zeros(ids.size(0), ids.size(1) + 1, dtype=torch.float64, device=engine.mesh.device)

    def add(local: Tensor, labels: Tensor, owners: Tensor) -> None:
        log_total, _ = _log_sum_exp(local, engine.mesh.groups.tp)
        values = torch.cat([_picked(engine, local, ids[owners]), _least(engine, local).unsqueeze(1)], dim=1)
        if _speaks(engine):
            found[owners] = (values - log_total.unsqueeze(1)).double()

    _visit_targets(engine, rows, add)
    dist.all_reduce(found)
    found = found.cpu()
    return found[:, :-1], found[:, -1]


def _visit_targets(engine: Engine, rows: Sequence[GroupedRow], add: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Lets ``add`` see every target once: fp32 logits [n, padded_vocab / tp], labels [n] and groups [n] of some of them, on the
    last stage; all tensor-parallel ranks of it see the same ones, with their part of the vocabulary."""
    batch = engine.prepare(len(rows), rows.__getitem__)
    targets_of = zip(groups_here(rows, batch), _others_here(rows, batch), strict=True)

    def consume(logits: Tensor, micro_batch: MicroBatch, places: list[int]) -> None:
        groups, others = next(targets_of)  # stages take micro-batches in their order
        counted = np.flatnonzero(groups != UNCOUNTED)
        at = torch.from_numpy(np.concatenate([counted, others[0]])).to(logits.device)
        owners = torch.from_numpy(np.concatenate([groups[counted], others[2]])).to(logits.device)
        labels = micro_batch.labels.squeeze(0)[at]
        labels[len(counted) :] = torch.from_numpy(others[1]).to(labels)
        # fp32 for those that count alone: whole rows of logits in it are large
        add(logits.squeeze(0)[at].float(), labels, owners)

    engine.forward_logits(batch, consume)


def _speaks(engine: Engine) -> bool:
    """Whether what this tensor-parallel rank has found is taken: its peers have the same."""
    return engine.mesh.groups.tp.rank() == 0


def groups_here(rows: Sequence[GroupedRow], batch: PreparedBatch) -> list[np.ndarray]:
    """The groups of what this rank computes of each micro-batch, int64 [t]; each target of a row is in one of them alone."""
    nobody, found = np.full(len(rows[0].groups), UNCOUNTED, np.int64), []
    for micro_batch, owners in zip(batch.micro_batches, _counted_rows(rows, batch), strict=True):
        whole = np.concatenate([nobody if row is None else row.groups for row in owners])
        found.append(np.where(micro_batch.positions == FILLING, UNCOUNTED, whole[micro_batch.positions]))
    return found


def _others_here(rows: Sequence[GroupedRow], batch: PreparedBatch) -> list[np.ndarray]:
    """Likewise of the further targets; int64 [3, n]: index of the position in this rank's part, token id, group."""
    length, found = len(rows[0].groups), []
    for micro_batch, owners in zip(batch.micro_batches, _counted_rows(rows, batch), strict=True):
        asked = [
            (number * length + place, token, group)
            for number, row in enumerate(owners)
            for place, token, group in (row.others if row is not None else ())
        ]
        here = {int(position): index for index, position in enumerate(micro_batch.positions)} if asked else {}
        own = [(here[position], token, group) for position, token, group in asked if position in here]
        found.append(np.array(own, np.int64).reshape(-1, 3).T)
    return found


def _counted_rows(rows: Sequence[GroupedRow], batch: PreparedBatch) -> Iterator[list[GroupedRow | None]]:
    """The rows of each micro-batch; None for one that was counted: the last may come again to fill a round."""
    done: set[int] = set()
    for places in batch.places:
        yield [rows[place] if place not in done | set(places[:i]) else None for i, place in enumerate(places)]
        done.update(places)


def _of_labels(engine: Engine, local: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[n] log-probabilities of labels, and whether each is the likeliest token, from fp32 logits [n, padded_vocab / tp]."""
    label_logits = _picked(engine, local, labels.unsqueeze(1)).squeeze(1)
    log_total, largest = _log_sum_exp(local, engine.mesh.groups.tp)
    return label_logits - log_total, label_logits >= largest


def _picked(engine: Engine, local: Tensor, ids: Tensor) -> Tensor:
    """[n, k] logits of ids [n, k] of the whole vocabulary, wherever they lie."""
    group = engine.mesh.groups.tp
    places = ids - group.rank() * local.size(1)
    mine = (places >= 0) & (places < local.size(1))
    picked = local.gather(1, places.clamp(0, local.size(1) - 1))
    picked = torch.where(mine, picked, torch.zeros_like(picked))
    dist.all_reduce(picked, group=group)
    return picked


def _likeliest(engine: Engine, local: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits [n, count] of the likeliest tokens of the whole vocabulary; ``count`` is at most that."""
    group, tp = engine.mesh.groups.tp, engine.mesh.tp
    values, ids = local.topk(min(count, local.size(1)), dim=1)
    all_values, all_ids = _gathered(values, tp, group), _gathered(ids + group.rank() * local.size(1), tp, group)
    best, places = all_values.topk(count, dim=1)
    return all_ids.gather(1, places), best


def _least(engine: Engine, local: Tensor) -> Tensor:
    """[n] smallest logit of the whole vocabulary; padded rows, at -inf, are none of it."""
    least = torch.where(local.isneginf(), torch.inf, local).amin(dim=1)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=engine.mesh.groups.tp)
    return least


def _scores(engine: Engine, logits: Tensor, batch: MicroBatch) -> RowScores:
    local = logits.float().squeeze(0)  # [T, padded_vocab / tp]
    label_logits = _picked(engine, local, batch.labels.squeeze(0).unsqueeze(1)).squeeze(1)
    log_total, _ = _log_sum_exp(local, engine.mesh.groups.tp)
    ids, best = _likeliest(engine, local, min(TOP, engine.shape.vocab_size))
    return RowScores(label_logits - log_total, ids, best - log_total.unsqueeze(1))


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

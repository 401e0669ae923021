"""Requests to the model, packed into rows and answered in one pass.

They are short and many: one a row would compute mostly padding. They are packed as documents are, so one does not see another,
and each gets the log-probability that it has alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpt_mega.data.packing import RowPlan, plan_rows
from cpt_mega.data.rows import PAD_ID
from cpt_mega.engine.hidden import hidden_at_targets
from cpt_mega.engine.score import UNCOUNTED, likeliest_of_targets, logprobs_at_targets, score_groups
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates.requests import Likeliest, Likelihood, Request

_MICRO_BATCHES = 4  # of a pipeline stage between two looks at signals


class Interrupted(Exception):
    """A look was given up in its middle, because the run is to end."""


def score_requests(
    engine: Engine,
    requests: Sequence[Request],
    row_tokens: int,
    stops: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Likelihood]:
    """Answers requests, in their order, on every rank. A collective: all ranks pass the same ones.

    Args:
        row_tokens: of a packed row; rows are longer where a request is.
        stops: asked after every few micro-batches, on all ranks: whether to give up.
        advance: told how many requests have been answered since it was called last.

    Raises Interrupted when ``stops`` says so, InputError for a token that the model does not have.
    """
    values = np.zeros((len(requests), 3))
    for asked, rows in _rounds(engine, requests, row_tokens, stops):
        values[asked] = score_groups(engine, rows, len(asked)).numpy()
        advance(len(asked))
    return [Likelihood(logprob, hits == targets, int(targets)) for logprob, hits, targets in values.tolist()]


def likeliest_tokens(
    engine: Engine,
    requests: Sequence[Request],
    row_tokens: int,
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> Likeliest:
    """The likeliest tokens at every target of requests; as ``score_requests`` has it, on every rank."""
    first = _target_offsets(requests)
    ids, logprobs = np.zeros((2, first[-1], count))
    for asked, rows in _rounds(engine, requests, row_tokens, stops, by_target=True):
        places = _targets_of(asked, first)
        found = likeliest_of_targets(engine, rows, len(places), count)
        ids[places], logprobs[places] = found[0].numpy(), found[1].numpy()
    return Likeliest(ids.astype(np.int64), logprobs)


def distributions(
    engine: Engine,
    requests: Sequence[Request],
    row_tokens: int,
    ids: np.ndarray,
    stops: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of given tokens ``ids`` [targets, count] at every target of requests, and [targets] that of the least
    likely token of all; as ``score_requests`` has it, on every rank."""
    first = _target_offsets(requests)
    logprobs, least = np.zeros(ids.shape), np.zeros(len(ids))
    for asked, rows in _rounds(engine, requests, row_tokens, stops, by_target=True):
        places = _targets_of(asked, first)
        found = logprobs_at_targets(engine, rows, torch.from_numpy(ids[places]))
        logprobs[places], least[places] = found[0].numpy(), found[1].numpy()
    return logprobs, least


def hidden_states(engine: Engine, requests: Sequence[Request], row_tokens: int, projection: np.ndarray) -> np.ndarray:
    """Hidden states after each stage of the model, at every target of requests, as ``hidden_at_targets`` has them: float32
    [layers + 2, targets, numbers], on every rank. A collective."""
    first = _target_offsets(requests)
    found = np.zeros((engine.shape.layers + 2, first[-1], projection.shape[1]), np.float32)
    for asked, rows in _rounds(engine, requests, row_tokens, lambda: False, by_target=True):
        places = _targets_of(asked, first)
        found[:, places] = hidden_at_targets(engine, rows, len(places), torch.from_numpy(projection)).numpy()
    return found


def _target_offsets(requests: Sequence[Request]) -> np.ndarray:
    """Where the targets of each request begin when those of all stand one behind the other; int64 [requests + 1]."""
    return np.cumsum([0, *(len(request.tokens) - request.first for request in requests)])


def _targets_of(asked: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Where the targets of some requests stand among those of all; int64."""
    return np.concatenate([np.arange(first[request], first[request + 1]) for request in asked])


def _check_ids(requests: Sequence[Request], vocab_size: int) -> None:
    largest = max(int(request.tokens.max()) for request in requests)
    if largest >= vocab_size:
        fix = f"outside the model's vocabulary of {vocab_size}; give the tokenizer that the model was imported with"
        raise InputError("token id of an item", largest, fix)


def _rounds(
    engine: Engine, requests: Sequence[Request], row_tokens: int, stops: Callable[[], bool], by_target: bool = False
) -> Iterator[tuple[np.ndarray, list["_RequestRow"]]]:
    """Packs requests; gives some of them at a time, so many that every process has some micro-batches: their indices, and rows.

    Groups of the rows are the requests in the order of the indices; or, ``by_target``, all of their targets one behind the
    other. Raises as ``score_requests``.
    """
    if not requests:
        return
    _check_ids(requests, engine.shape.vocab_size)
    inputs = np.array([request.inputs for request in requests], np.int64)
    plan = plan_rows(inputs, max(row_tokens, int(inputs.max())))
    size = _MICRO_BATCHES * engine.mesh.pp * engine.mesh.dp * engine.config.train.micro_batch_size
    for start in range(0, plan.rows, size):
        if stops():
            raise Interrupted
        rows = range(start, min(start + size, plan.rows))
        asked = np.array([request for row in rows for request, _, _ in plan.pieces(row)], np.int64)
        numbers = _target_offsets([requests[request] for request in asked]) if by_target else range(len(asked))
        groups = dict(zip(asked.tolist(), numbers, strict=False))
        yield asked, [_RequestRow.of(plan, row, requests, groups, by_target) for row in rows]


@dataclass(frozen=True)
class _RequestRow:
    """Requests one behind the other, padding last; fields as ``engine.score.GroupedRow`` has them."""

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    doc_lengths: list[int]
    groups: np.ndarray

    @classmethod
    def of(
        cls, plan: RowPlan, row: int, requests: Sequence[Request], first: Mapping[int, int], by_target: bool
    ) -> "_RequestRow":
        """Row ``row`` of a plan over requests; ``first``: the group of each one's first target, which all of them are in, or,
        ``by_target``, from which on they have a group each."""
        ids, labels = np.full((2, plan.seq_length), PAD_ID, np.int64)
        groups = np.full(plan.seq_length, UNCOUNTED, np.int64)
        doc_lengths, at = [], 0
        for index, _, length in plan.pieces(row):  # whole ones: a row has room for the longest
            request = requests[index]
            ids[at : at + length], labels[at : at + length] = request.tokens[:-1], request.tokens[1:]
            counts = True if request.counts is None else request.counts[request.first :]
            owners = first[index] + by_target * np.arange(len(request.tokens) - request.first)
            groups[at + request.first - 1 : at + length] = np.where(counts, owners, UNCOUNTED)
            doc_lengths += [*request.lengths[:-1], length - sum(request.lengths[:-1])]
            at += length
        if at < plan.seq_length:
            doc_lengths.append(plan.seq_length - at)
        return cls(ids, labels, (groups != UNCOUNTED).astype(np.float32), doc_lengths, groups)

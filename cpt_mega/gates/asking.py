"""Requests to the model, packed into rows and answered in one pass.

They are short and many: one a row would compute mostly padding. They are packed as documents are, so one does not see another,
and each gets the log-probability that it has alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cpt_mega.data.packing import RowPlan, plan_rows
from cpt_mega.data.rows import PAD_ID
from cpt_mega.engine.score import UNCOUNTED, score_groups
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates.requests import Likelihood, Request

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
    if not requests:
        return []
    _check_ids(requests, engine.shape.vocab_size)
    inputs = np.array([request.inputs for request in requests], np.int64)
    plan = plan_rows(inputs, max(row_tokens, int(inputs.max())))
    values = np.zeros((len(requests), 3))
    for rows in _rounds(engine, plan):
        if stops():
            raise Interrupted
        asked = np.concatenate([_requests_of(plan, row) for row in rows])
        numbers = dict(zip(asked.tolist(), range(len(asked)), strict=True))
        packed = [_RequestRow.of(plan, row, requests, numbers) for row in rows]
        values[asked] = score_groups(engine, packed, len(asked)).numpy()
        advance(len(asked))
    return [Likelihood(logprob, hits == targets, int(targets)) for logprob, hits, targets in values.tolist()]


def _check_ids(requests: Sequence[Request], vocab_size: int) -> None:
    largest = max(int(request.tokens.max()) for request in requests)
    if largest >= vocab_size:
        fix = f"outside the model's vocabulary of {vocab_size}; give the tokenizer that the model was imported with"
        raise InputError("token id of an item", largest, fix)


def _rounds(engine: Engine, plan: RowPlan) -> Iterator[range]:
    """The rows of a plan, so many at a time that every process has some micro-batches."""
    size = _MICRO_BATCHES * engine.mesh.pp * engine.mesh.dp * engine.config.train.micro_batch_size
    for start in range(0, plan.rows, size):
        yield range(start, min(start + size, plan.rows))


def _requests_of(plan: RowPlan, row: int) -> np.ndarray:
    return np.array([request for request, _, _ in plan.pieces(row)], np.int64)


@dataclass(frozen=True)
class _RequestRow:
    """Requests one behind the other, padding last; fields as ``engine.score.GroupedRow`` has them."""

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    doc_lengths: list[int]
    groups: np.ndarray

    @classmethod
    def of(cls, plan: RowPlan, row: int, requests: Sequence[Request], numbers: dict[int, int]) -> "_RequestRow":
        """Row ``row`` of a plan over requests, whose targets are counted under their ``numbers``."""
        ids, labels = np.full((2, plan.seq_length), PAD_ID, np.int64)
        groups = np.full(plan.seq_length, UNCOUNTED, np.int64)
        doc_lengths, at = [], 0
        for index, _, length in plan.pieces(row):  # whole ones: a row has room for the longest
            request = requests[index]
            ids[at : at + length], labels[at : at + length] = request.tokens[:-1], request.tokens[1:]
            counts = True if request.counts is None else request.counts[request.first :]
            groups[at + request.first - 1 : at + length] = np.where(counts, numbers[index], UNCOUNTED)
            doc_lengths += [*request.lengths[:-1], length - sum(request.lengths[:-1])]
            at += length
        if at < plan.seq_length:
            doc_lengths.append(plan.seq_length - at)
        return cls(ids, labels, (groups != UNCOUNTED).astype(np.float32), doc_lengths, groups)

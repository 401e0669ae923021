"""Requests to the model, packed into rows and answered in one pass.

They are short and many: one a row would compute mostly padding. They are packed as documents are, so one does not see another,
and each gets the log-probability that it has alone. Those that differ in their last token alone are read once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

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
    values, texts = np.zeros((len(requests), 3)), _texts(requests)
    for asked, first, rows in _rounds(engine, texts, row_tokens, stops):
        found = score_groups(engine, rows, int(first[-1])).numpy()
        for number, start, end in zip(asked, first, first[1:], strict=False):
            text = texts[number]
            values[list(text.requests)] = found[start] + found[start + 1 : end] if text.lasts else found[start]
            advance(len(text.requests))
    return [Likelihood(logprob, hits == targets, int(targets)) for logprob, hits, targets in values.tolist()]


def likeliest_tokens(
    engine: Engine,
    requests: Sequence[Request],
    row_tokens: int,
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> Likeliest:
    """The likeliest tokens at every target of requests; as ``score_requests`` has it, on every rank."""
    texts = _of_targets(requests)
    first = _group_offsets(texts)
    ids, logprobs = np.zeros((2, first[-1], count))
    for asked, _, rows in _rounds(engine, texts, row_tokens, stops):
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
    texts = _of_targets(requests)
    first = _group_offsets(texts)
    logprobs, least = np.zeros(ids.shape), np.zeros(len(ids))
    for asked, _, rows in _rounds(engine, texts, row_tokens, stops):
        places = _targets_of(asked, first)
        found = logprobs_at_targets(engine, rows, torch.from_numpy(ids[places]))
        logprobs[places], least[places] = found[0].numpy(), found[1].numpy()
    return logprobs, least


def hidden_states(engine: Engine, requests: Sequence[Request], row_tokens: int, projection: np.ndarray) -> np.ndarray:
    """Hidden states after each stage of the model, at every target of requests, as ``hidden_at_targets`` has them: float32
    [layers + 2, targets, numbers], on every rank. A collective."""
    texts = _of_targets(requests)
    first = _group_offsets(texts)
    found = np.zeros((engine.shape.layers + 2, first[-1], projection.shape[1]), np.float32)
    for asked, _, rows in _rounds(engine, texts, row_tokens, lambda: False):
        places = _targets_of(asked, first)
        found[:, places] = hidden_at_targets(engine, rows, len(places), torch.from_numpy(projection)).numpy()
    return found


def _targets_of(asked: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Where the targets of some requests stand among those of all; int64."""
    return np.concatenate([np.arange(first[request], first[request + 1]) for request in asked])


def _check_ids(texts: Sequence["_Text"], vocab_size: int) -> None:
    largest = max(max(int(text.request.tokens.max()), *text.lasts, 0) for text in texts)
    if largest >= vocab_size:
        fix = f"outside the model's vocabulary of {vocab_size}; give the tokenizer that the model was imported with"
        raise InputError("token id of an item", largest, fix)


@dataclass(frozen=True)
class _Text:
    """What the model reads once, for one request or for several that differ in their last token alone.

    Attributes:
        request: the first of them.
        requests: their numbers.
        lasts: the last token of each, where they are several: a group each, behind one for the targets that they share.
        by_target: whether each target is a group of its own.
    """

    request: Request
    requests: tuple[int, ...]
    lasts: tuple[int, ...] = ()
    by_target: bool = False

    @property
    def groups(self) -> int:
        return len(self.request.tokens) - self.request.first if self.by_target else 1 + len(self.lasts)


def _texts(requests: Sequence[Request]) -> list[_Text]:
    """Requests that differ in their last token alone, as letters and other short choices do, are one text."""
    same: dict[object, list[int]] = {}
    for number, request in enumerate(requests):
        same.setdefault(number if request.counts is not None else _all_but_the_last(request), []).append(number)
    return [
        _Text(requests[first], (first, *rest), tuple(int(requests[n].tokens[-1]) for n in (first, *rest) if rest))
        for first, *rest in same.values()
    ]


def _all_but_the_last(request: Request) -> tuple:
    before = blake2b(request.tokens[:-1].tobytes(), digest_size=16).digest()  # held-out texts are long
    return before, request.first, request.lengths


def _of_targets(requests: Sequence[Request]) -> list[_Text]:
    """A text for each request, every target of which is asked for by itself."""
    return [_Text(request, (number,), by_target=True) for number, request in enumerate(requests)]


def _group_offsets(texts: Iterable[_Text]) -> np.ndarray:
    """Where the groups of each text begin when those of all stand one behind the other; int64 [texts + 1]."""
    return np.cumsum([0, *(text.groups for text in texts)])


def _rounds(
    engine: Engine, texts: Sequence[_Text], row_tokens: int, stops: Callable[[], bool]
) -> Iterator[tuple[np.ndarray, np.ndarray, list["_TextRow"]]]:
    """Packs texts; gives some of them at a time, so many that every process has some micro-batches: their indices, int64 [n],
    where the groups of each begin in the order of the indices, int64 [n + 1], and rows.

    Raises as ``score_requests``.
    """
    if not texts:
        return
    _check_ids(texts, engine.shape.vocab_size)
    inputs = np.array([text.request.inputs for text in texts], np.int64)
    plan = plan_rows(inputs, max(row_tokens, int(inputs.max())))
    size = _MICRO_BATCHES * engine.mesh.pp * engine.mesh.dp * engine.config.train.micro_batch_size
    for start in range(0, plan.rows, size):
        if stops():
            raise Interrupted
        rows = range(start, min(start + size, plan.rows))
        asked = np.array([text for row in rows for text, _, _ in plan.pieces(row)], np.int64)
        first = _group_offsets(texts[text] for text in asked)
        groups = dict(zip(asked.tolist(), first.tolist(), strict=False))
        yield asked, first, [_TextRow.of(plan, row, texts, groups) for row in rows]


@dataclass(frozen=True)
class _TextRow:
    """Texts one behind the other, padding last; fields as ``engine.score.GroupedRow`` has them."""

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    doc_lengths: list[int]
    groups: np.ndarray
    others: list[tuple[int, int, int]]

    @classmethod
    def of(cls, plan: RowPlan, row: int, texts: Sequence[_Text], first: Mapping[int, int]) -> "_TextRow":
        """Row ``row`` of a plan over texts; ``first``: of the groups of each."""
        ids, labels = np.full((2, plan.seq_length), PAD_ID, np.int64)
        groups = np.full(plan.seq_length, UNCOUNTED, np.int64)
        doc_lengths, others, at = [], [], 0
        for index, _, length in plan.pieces(row):  # whole ones: a row has room for the longest
            text, request, end = texts[index], texts[index].request, at + length
            ids[at:end], labels[at:end] = request.tokens[:-1], request.tokens[1:]
            counts = True if request.counts is None else request.counts[request.first :]
            owners = first[index] + text.by_target * np.arange(len(request.tokens) - request.first)
            groups[at + request.first - 1 : end] = np.where(counts, owners, UNCOUNTED)
            if text.lasts:
                groups[end - 1] = UNCOUNTED
                others += [(end - 1, token, first[index] + 1 + number) for number, token in enumerate(text.lasts)]
            doc_lengths += [*request.lengths[:-1], length - sum(request.lengths[:-1])]
            at = end
        if at < plan.seq_length:
            doc_lengths.append(plan.seq_length - at)
        mask = groups != UNCOUNTED
        mask[[place for place, _, _ in others]] = True
        return cls(ids, labels, mask.astype(np.float32), doc_lengths, groups, others)

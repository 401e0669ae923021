"""A task of lm-evaluation-harness: its prompts, its metrics, lm-eval's own code for both.

Needs the extra ``harness`` (see ``cpt_mega.gates.harness``). Its texts are built once; what is scored of an item, and the
metrics over all of them, is what lm-eval makes of the answers.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from cpt_mega.errors import InputError
from cpt_mega.gates import harness
from cpt_mega.gates.harness import RequestMaker
from cpt_mega.gates.items import first_items
from cpt_mega.gates.probes.probe import OTHER, RIGHT_OR_WRONG, ItemScore, Reading
from cpt_mega.gates.requests import Likelihood, Request

# Where the texts lie says nothing of them; they are part of the identity themselves.
_PLACES = ("dataset_path", "dataset_kwargs")
_RIGHT_OR_WRONG = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
# Means over log-probabilities, turned into something of which less is better only when all are there.
_OF_LOGPROBS = {"perplexity", "weighted_perplexity", "bits_per_byte"}
_LOGPROB = "logprob"
_DRY = Likelihood(-1.0, False, 1)


@dataclass(frozen=True)
class _Item:
    """A document of the task; ``asked`` are the requests of each of lm-eval's instances."""

    id: str
    doc: Any
    instances: list
    asked: list[Request | list[Request]]


class Harness:
    """A task whose answers are likelihoods.

    Values of an item: ``logprob/N`` of each of its N texts, and its metrics; one of several numbers (a log-probability and
    the words it is over) as ``metric/0`` and so on.
    """

    def __init__(
        self, name: str, bucket: str, task: harness.Task, maker: RequestMaker, metric: str | None, max_items: int | None
    ):
        """``task``: with its instances. Raises InputError for a ``metric`` that no item can be compared by."""
        self.name, self.bucket = name, bucket
        self._task = task
        self._items = _items(task, maker, max_items)
        self.requests = [
            request
            for item in self._items
            for each in item.asked
            for request in (each if isinstance(each, list) else [each])
        ]
        if not self.requests:
            raise InputError(f"suite probe {name}", task.task_name, "its texts have no token")
        dry = self._dry()
        names = dict.fromkeys(key.split("/")[0] for values in dry for key in values)
        self._metrics = [name for name in names if name != _LOGPROB]
        self.metric = self._compared(metric, dry)
        self.scale = RIGHT_OR_WRONG if self.metric in _RIGHT_OR_WRONG else OTHER
        self.ids = [item.id for item in self._items]

    def contents(self) -> None:
        """See Probe: what is the item's own in a prompt is known to the task alone."""

    def identity(self) -> object:
        """See Probe."""
        config = {key: value for key, value in self._task.dump_config().items() if key not in _PLACES}
        config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}  # a path
        items = [[item.id, item.doc, [each.arguments for each in item.instances]] for item in self._items]
        tokens = [[request.first, request.tokens.tolist()] for request in self.requests]
        said = json.dumps([config, items], default=_plain, sort_keys=True)
        return ["harness", self.name, self.bucket, self.metric, harness.VERSION, said, tokens]

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """See Probe."""
        values = zip(self._items, self._values(answers), strict=True)
        return [ItemScore(item.id, self._score(self.metric, found), found) for item, found in values]

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe: lm-eval's metrics, by its own aggregations."""
        found = []
        for metric in (self.metric, *(name for name in self._metrics if name != self.metric)):
            values = [value for item in items if (value := _rebuilt(item.values, metric)) is not None]
            found.append(Reading(metric, _aggregated(self._aggregation(metric), values), len(values)))
        return found

    def _values(self, answers: Sequence[Likelihood]) -> list[dict[str, float]]:
        """All that is known of each item."""
        rest, logprobs = iter(answers), []
        for item in self._items:
            logprobs.append([])
            for instance, asked in zip(item.instances, item.asked, strict=True):
                own = [next(rest) for _ in asked] if isinstance(asked, list) else [next(rest)]
                instance.resps = [harness.response(asked, own)] * (instance.repeats or 1)
                logprobs[-1].append(math.fsum(answer.logprob for answer in own))
        with harness.seeded():
            self._task.apply_filters()
            metrics = [self._measured(item) for item in self._items]
        return [
            dict([*_flat(_LOGPROB, own), *(pair for name, value in more.items() for pair in _flat(name, value))])
            for own, more in zip(logprobs, metrics, strict=True)
        ]

    def _measured(self, item: _Item) -> dict[str, Any]:
        found = {}
        for kind in item.instances[0].filtered_resps:
            results = [instance.filtered_resps[kind] for instance in item.instances]
            ending = "" if kind == "none" else f",{kind}"
            found |= {f"{name}{ending}": value for name, value in self._task.process_results(item.doc, results).items()}
        return found

    def _dry(self) -> list[dict[str, float]]:
        """Values from answers that no model gave: what fails in the task's own code fails now, and not in a run."""
        try:
            return self._values([_DRY] * len(self.requests))
        except Exception as error:  # the task's own code
            fix = f"lm-eval cannot score it ({type(error).__name__}: {error})"
            raise InputError(f"suite probe {self.name}", self._task.task_name, fix) from error

    def _compared(self, metric: str | None, dry: Sequence[Mapping[str, float]]) -> str:
        """The metric that items have each for itself: the one asked for, or the first."""
        known = [name for name in self._metrics if not all(math.isnan(self._score(name, values)) for values in dry)]
        if metric in known or (metric is None and known):
            return metric or known[0]
        raise InputError(f"suite probe {self.name} metric", metric, f"items can be compared by one of {known}")

    def _score(self, metric: str, values: Mapping[str, float]) -> float:
        """NaN for what only all items together have."""
        found, aggregation = _rebuilt(values, metric), _name(self._aggregation(metric))
        if aggregation in _OF_LOGPROBS and isinstance(found, tuple):
            return found[0] / max(found[1], 1)
        if found is None or isinstance(found, tuple):
            return math.nan
        lower = not self._task.higher_is_better().get(metric.split(",")[0], True)
        return -float(found) if lower and aggregation not in _OF_LOGPROBS else float(found)

    def _aggregation(self, metric: str) -> Callable[[list], float]:
        """lm-eval's own; the mean where the task has none, as there."""
        return self._task.aggregation().get(metric.split(",")[0], harness.mean)


def _items(task: harness.Task, maker: RequestMaker, most: int | None) -> list[_Item]:
    """Documents with what is asked of them; their ids are lm-eval's."""
    ordered = sorted(task.instances, key=lambda each: (each.doc_id, each.idx))
    found = []
    for number, own in groupby(ordered, key=lambda each: each.doc_id):
        instances = list(own)
        asked = [getattr(maker, each.request_type)([each], disable_tqdm=True)[0] for each in instances]
        found.append(_Item(f"{number:06d}", instances[0].doc, instances, asked))
    kept = first_items(found, most)
    task.instances[:] = [instance for item in kept for instance in item.instances]  # what filters are applied to
    return kept


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers in sequences under the names of their places."""
    if isinstance(value, list | tuple | np.ndarray):
        for place, part in enumerate(value):
            yield from _flat(f"{name}/{place}", part)
    else:
        yield name, float(value)


def _rebuilt(values: Mapping[str, float], name: str) -> Any:
    """What ``_flat`` made numbers of; whole ones as int, for they may be indices. None where there is nothing."""
    if name in values:
        return int(values[name]) if float(values[name]).is_integer() else values[name]
    parts: list = []
    while any(key == f"{name}/{len(parts)}" or key.startswith(f"{name}/{len(parts)}/") for key in values):
        parts.append(_rebuilt(values, f"{name}/{len(parts)}"))
    return tuple(parts) or None


def _aggregated(aggregation: Callable[[list], float], values: list) -> float:
    try:
        return float(aggregation(values))
    except OverflowError:  # exp of a log-probability of very many tokens a word
        return math.inf


def _name(function: object) -> str:
    return getattr(function, "__name__", "")


def _plain(value: object) -> str:
    """A function as its source; addresses in memory are no part of what anything says."""
    try:
        return inspect.getsource(value)  # type: ignore[arg-type]
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))

"""Multiple choice by likelihood: which continuation the model finds likeliest.

``acc`` goes by the log-probability, ``acc_norm`` by that a byte of the choice (lm-evaluation-harness divides by its characters;
of a letter alone there is nothing to divide by). Of a model that has no finite log-probability for any choice nothing is a
number, and so is none of its scores. ``brier`` is the squared distance of the choices' probabilities, made to sum to
one, from the right answer (Brier 1950): it moves where the likeliest choice does not change yet.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from cpt_mega.errors import InputError
from cpt_mega.gates.chats import ChatTexts, question_in_words
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import LETTERS, ChoiceItem
from cpt_mega.gates.probes.probe import RIGHT_OR_WRONG, Content, ItemScore, Reading
from cpt_mega.gates.requests import Likelihood, Request

Style = Literal["cloze", "letters", "continuation", "reply"]


class Choice:
    """Items with a right choice.

    Args:
        shown: put before each, with their answers, and not scored.
        are_generated: such items have nothing that could be learnt by heart.
        chats: renders questions and choices as a user's and an assistant's; an item that spells a special token is in words.

    ``in_words`` counts the items that are not put as a chat.

    Raises InputError for an item that the chat template refuses, and what ``Encoder`` raises.
    """

    scale = RIGHT_OR_WRONG

    def __init__(
        self,
        name: str,
        bucket: str,
        items: Sequence[ChoiceItem],
        encoder: Encoder,
        style: Style = "cloze",
        metric: str = "acc",
        shown: Sequence[ChoiceItem] = (),
        are_generated: bool = False,
        chats: ChatTexts | None = None,
    ):
        self.name, self.bucket, self.metric = name, bucket, metric
        self._items, self._style, self._encoder, self._are_generated = list(items), style, encoder, are_generated
        self.ids = [item.id for item in self._items]
        self._shown, self._chats, self.in_words = list(shown), chats, 0
        self._pairs: list[tuple[str, str]] = []
        self.requests: list[Request] = []
        for item in self._items:
            pairs = self._in_chat(item)
            if pairs is None:
                self.in_words += 1
                pairs = self._in_words(item)
                self.requests += encoder.continued(pairs)
            else:
                self.requests += encoder.replied(pairs, chats)
            self._pairs += pairs

    def contents(self) -> list[Content] | None:
        """See Probe: the question and its right answer."""
        if self._are_generated:
            return None
        texts = [f"{item.question.strip()} {item.choices[item.answer].strip()}" for item in self._items]
        forms = self._encoder.forms(texts)
        return [Content(item.id, own) for item, own in zip(self._items, forms, strict=True)]

    def identity(self) -> object:
        """See Probe."""
        answers = [[item.id, item.answer] for item in self._items]
        # which of a tokenizer's tokens are special is not in its own digest
        specials = [] if self._chats is None else [self._chats.specials]
        return ["choice", self.name, self.bucket, self.metric, self._style, answers, self._pairs, *specials]

    def items(self, answers: Sequence[Likelihood]) -> list[ItemScore]:
        """See Probe."""
        found, at = [], 0
        for item in self._items:
            here = slice(at, at + len(item.choices))
            found.append(self._score(item, answers[here], [ending for _, ending in self._pairs[here]]))
            at = here.stop
        return found

    def readings(self, items: Sequence[ItemScore]) -> list[Reading]:
        """See Probe."""
        metrics = [self.metric, *(name for name in ("acc", "acc_norm", "brier") if name != self.metric)]
        return [Reading(metric, fmean(item.values[metric] for item in items), len(items)) for metric in metrics]

    def _in_words(self, item: ChoiceItem) -> list[tuple[str, str]]:
        style = self._style
        before = "".join(f"{_prompt(one, style)}{_endings(one, style)[one.answer]}\n\n" for one in self._shown)
        return [(before + _prompt(item, style), ending) for ending in _endings(item, style)]

    def _in_chat(self, item: ChoiceItem) -> list[tuple[str, str]] | None:
        """The texts of an item as a chat; None where it spells a special token, and without a template."""
        if self._chats is None:
            return None
        shown = [(one.question, one.choices[one.answer]) for one in self._shown]
        try:
            return self._chats.pairs(shown, item.question, item.choices)
        except ValueError as error:
            fix = f"{error}; mend the item, or give the probe chat: false"
            raise InputError(f"suite probe {self.name}", item.id, fix) from error

    def _score(self, item: ChoiceItem, answers: Sequence[Likelihood], endings: Sequence[str]) -> ItemScore:
        logprobs = [answer.logprob for answer in answers]
        if not any(map(math.isfinite, logprobs)):
            values = dict.fromkeys(("acc", "acc_norm", "brier", "share", "chosen"), math.nan)
            return ItemScore(item.id, math.nan, values)
        sizes = [len(ending.removeprefix(" ").encode()) for ending in endings]
        likeliest = _first_largest(logprobs)
        per_byte = _first_largest([logprob / size for logprob, size in zip(logprobs, sizes, strict=True)])
        shares = _normalised(logprobs)
        brier = sum((share - (place == item.answer)) ** 2 for place, share in enumerate(shares))
        values = {
            "acc": float(likeliest == item.answer),
            "acc_norm": float(per_byte == item.answer),
            "brier": brier,
            "share": shares[item.answer],
            "chosen": float(likeliest),
        }
        return ItemScore(item.id, values[self.metric], values)


def _prompt(item: ChoiceItem, style: Style) -> str:
    if style == "continuation":
        return item.question
    if style == "reply":
        return question_in_words(item.question)
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
    lines = [f"Question: {item.question}", *(listed if style == "letters" else ()), "Answer:"]
    return "\n".join(lines)


def _endings(item: ChoiceItem, style: Style) -> list[str]:
    """What is scored behind the prompt; a blank before a word is part of its token."""
    return [f" {ending}" for ending in (LETTERS[: len(item.choices)] if style == "letters" else item.choices)]


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: (_number(values[place]), -place))


def _number(value: float) -> float:
    """A model that is lost has no likeliest choice: NaN is below everything."""
    return -math.inf if math.isnan(value) else value


def _normalised(logprobs: Sequence[float]) -> list[float]:
    largest = max(map(_number, logprobs))
    if not math.isfinite(largest):
        return [1 / len(logprobs)] * len(logprobs)
    weights = [math.exp(_number(value) - largest) for value in logprobs]
    return [weight / sum(weights) for weight in weights]

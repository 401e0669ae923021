"""Items of probes as users have them: JSONL in the shapes of the common benchmarks, and MMLU's CSV.

Whatever is wrong names the file, the line and the field: an item that is passed over would change what is measured.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpt_mega.errors import InputError
from cpt_mega.lineage import parse_json, text_digest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# By the names that MMLU, MMLU-Pro, HellaSwag and ARC have for them.
_QUESTION, _CHOICES, _ANSWER = ("question", "ctx"), ("choices", "endings", "options"), ("answer", "label", "answerKey")


@dataclass(frozen=True)
class ChoiceItem:
    """A text and what may follow; ``answer`` is the index of the right choice."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class AnswerItem:
    """A question and its one answer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class BoundaryItem:
    """Two documents; ``target`` goes on the second one, and can only be known from the first."""

    id: str
    first: str
    second: str
    target: str


@dataclass(frozen=True)
class ChatItem:
    """Messages, each with ``role`` and ``content``."""

    id: str
    messages: tuple[dict, ...]


@dataclass(frozen=True)
class TextItem:
    """A document."""

    id: str
    text: str


Item = TypeVar("Item", ChoiceItem, AnswerItem, BoundaryItem, ChatItem, TextItem)


def read_choices(path: Path) -> list[ChoiceItem]:
    """Raises InputError (file, line, fix) for anything that is no item, and for two items of one id."""
    if path.suffix == ".csv":
        return _items(path, _csv_lines(path), _csv_choice)
    return _items(path, _json_lines(path), _choice)


def read_answers(path: Path) -> list[AnswerItem]:
    """As ``read_choices``."""
    return _items(path, _json_lines(path), lambda name, line: AnswerItem(name, *_texts(line, "question", "answer")))


def read_pairs(path: Path) -> list[BoundaryItem]:
    """As ``read_choices``."""
    make = lambda name, line: BoundaryItem(name, *_texts(line, "first", "second", "target"))  # noqa: E731
    return _items(path, _json_lines(path), make)


def holds_chats(path: Path) -> bool:
    """Whether the first item of a file has messages."""
    first = next((line for _, line in _json_lines(path)), {})
    return "messages" in first


def read_chats(path: Path) -> list[ChatItem]:
    """As ``read_choices``."""
    return _items(path, _json_lines(path), lambda name, line: ChatItem(name, _messages(line)))


def read_texts(path: Path, field: str) -> list[TextItem]:
    """As ``read_choices``."""
    return _items(path, _json_lines(path), lambda name, line: TextItem(name, *_texts(line, field)))


def first_items(items: Sequence, most: int | None) -> list:
    """At most so many of what has an ``id``, always the same, from all over the file; in its order."""
    if most is None or len(items) <= most:
        return list(items)
    kept = set(sorted(range(len(items)), key=lambda place: text_digest(items[place].id))[:most])
    return [item for place, item in enumerate(items) if place in kept]


def _items(path: Path, lines: Iterator[tuple[int, Any]], make: Callable[[str, Any], Item]) -> list[Item]:
    found: dict[str, Item] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        name = _id(line)
        try:
            item = make(name, line)
        except ValueError as error:
            raise InputError(where, _shown(line), str(error)) from None
        if name in found:
            raise InputError(where, name, 'another item has this id; ids ("id", else the text itself) must differ')
        found[name] = item
    if not found:
        raise InputError("items", str(path), "holds no item")
    return list(found.values())


def _id(line: Any) -> str:
    """Its own, or the digest of all that it says: items keep their names when a file is sorted or cut."""
    own = line.get("id") if isinstance(line, dict) else None
    return str(own) if isinstance(own, str | int) else text_digest(repr(line))[:16]


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}", line.strip()[:80], f"is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}", line.strip()[:80], "an item is a JSON object")
        yield number, value


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        yield from ((rows.line_num, row) for row in rows)
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}", str(path), f"is not CSV ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as stream:
            yield from enumerate(stream, 1)
    except UnicodeDecodeError as error:
        raise InputError("items", str(path), f"is not UTF-8 ({error.reason}); save it so") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        why = getattr(error, "strerror", None) or error
        raise InputError("items", str(path), f"cannot be read ({why}); name an existing file") from None


def _choice(name: str, line: dict) -> ChoiceItem:
    question, choices, answer = (_value(line, names) for names in (_QUESTION, _CHOICES, _ANSWER))
    labels: Sequence[str] = LETTERS
    if isinstance(question, dict):  # ARC has the choices within the question
        question, choices = question.get("stem"), question.get("choices", choices)
    if isinstance(choices, dict):  # ARC again: {"text": [...], "label": [...]}
        choices, labels = choices.get("text"), choices.get("label", LETTERS)
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        labels = [str(choice.get("label")) for choice in choices]
        choices = [choice.get("text") for choice in choices]
    return _checked_choice(name, question, choices, answer, labels)


def _csv_choice(name: str, line: list[str]) -> ChoiceItem:
    if len(line) < 4:
        raise ValueError("a line is question, choices, letter of the answer")
    return _checked_choice(name, line[0], line[1:-1], line[-1], LETTERS)


def _checked_choice(name: str, question: Any, choices: Any, answer: Any, labels: Sequence[str]) -> ChoiceItem:
    if not (isinstance(question, str) and question.strip()):
        raise ValueError(f"needs a text under {' or '.join(_QUESTION)}")
    is_list = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not is_list or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"needs 2 to {len(LETTERS)} texts under {' or '.join(_CHOICES)}")
    for text in (question, *choices):
        text.encode()  # half of a surrogate pair is no text: a ValueError
    if not isinstance(labels, Sequence):
        raise ValueError("needs a list of labels beside its choices")
    if len(set(choices)) < len(choices):
        raise ValueError("has one choice twice")
    return ChoiceItem(name, question, tuple(choices), _index(answer, labels, len(choices)))


def _index(answer: Any, labels: Sequence[str], count: int) -> int:
    known = list(labels)[:count]
    index = known.index(answer) if answer in known else answer
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(f"needs the number (from 0) or the letter of a choice under {' or '.join(_ANSWER)}")
    return index


def _messages(line: dict) -> tuple[dict, ...]:
    messages = line.get("messages")
    is_list = isinstance(messages, list) and bool(messages) and all(isinstance(each, dict) for each in messages)
    if not is_list or not all(isinstance(each.get(name), str) for each in messages for name in ("role", "content")):
        raise ValueError("needs a list of messages, each with role and content")
    return tuple(messages)


def _value(line: dict, names: Sequence[str]) -> Any:
    return next((line[name] for name in names if name in line), None)


def _texts(line: dict, *names: str) -> Iterator[str]:
    for name in names:
        if not (isinstance(line.get(name), str) and line[name].strip()):
            raise ValueError(f"needs a text under {name}")
        line[name].encode()  # half of a surrogate pair is no text: a ValueError
        yield line[name]


def _shown(line: Any) -> str:
    return str(line)[:80]

"""Whether a file of evaluation items is fit to measure with: form, balance, wording, repetition. Pure: items in, problems out.

What a file must hold is in ``CONTENTS``, by the file's name. A word is a name here when the file never has it in lower case;
names and numbers are one placeholder before wordings are compared, so that fifty questions made from one pattern show.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from cpt_mega.json_types import type_problem


class Choice(TypedDict):
    id: str
    subject: str
    question: str
    choices: list[str]
    answer: int


class Short(TypedDict):
    id: str
    subject: str
    question: str
    answer: str


class Pair(TypedDict):
    id: str
    first: str
    second: str
    target: str


class Message(TypedDict):
    role: str
    content: str


class Chat(TypedDict):
    id: str
    messages: list[Message]


class Passage(TypedDict):
    id: str
    subject: str
    text: str


Role = Literal["system", "user", "assistant"]
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """Of one file: the form of its items, how many at least, and what only this kind of file has to be."""

    form: type
    least: int
    choices: tuple[int, ...] = ()  # how many an item may have
    even_lengths: bool = False  # the answer must not be told by its length
    subjects: int = 1


CONTENTS = {
    "knowledge": Content(Choice, 1200, (4,), even_lengths=True, subjects=20),
    "reasoning": Content(Choice, 600, (4,), even_lengths=True, subjects=5),
    "answers": Content(Short, 250, subjects=20),
    "behaviour": Content(Choice, 900, (2, 3, 4), subjects=6),
    "safety": Content(Choice, 2000, (2, 3, 4), subjects=6),
    "boundaries": Content(Pair, 60),
    "chat": Content(Chat, 150),
    "prose": Content(Passage, 40, subjects=8),
}

MOST_OF_ONE_WORDING = 0.05
MOST_NEAR_DUPLICATES = 0.02
NEAR = 0.5  # Jaccard of the sets of word 3-grams
LONGEST = (0.20, 0.32)  # share of items whose answer is the longest choice, ties divided
POSITION = 0.05  # how far the share of a position may be from what chance would give
WORDS_OF_AN_ANSWER = 8
WORDS_OF_A_PASSAGE = (120, 250)

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_NAME = "#"


@dataclass(frozen=True)
class Figures:
    """Of one file. Shares are of its items; ``positions`` is by number of choices, and by position within."""

    count: int
    opening: tuple[float, str]  # the commonest first four words, names and numbers replaced
    skeleton: tuple[float, str]  # the commonest five words in a row, likewise
    near_duplicates: float
    positions: dict[int, tuple[float, ...]]
    longest: float | None


def read(path: Path) -> list[Any]:
    """One JSON value a line; raises ``json.JSONDecodeError`` where a line is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(item: Item) -> str:
    """The text of an item whose wording must vary: what is put to the model."""
    if "messages" in item:
        return "\n".join(message["content"] for message in item["messages"] if message["role"] == "user")
    return item["question"] if "question" in item else item["text"] if "text" in item else item["second"]


def whole(item: Item) -> str:
    """All of an item that a model sees, for near-duplicates."""
    if "messages" in item:
        return "\n".join(message["content"] for message in item["messages"])
    return " ".join([item.get("first", ""), asked(item), *item.get("choices", ())])


def figures(items: Sequence[Item]) -> Figures:
    """Of items that have the right form."""
    skeletons = _skeletons([asked(item) for item in items])
    choices = [item for item in items if "choices" in item]
    grams = [_grams(whole(item)) for item in items]
    near = {place for pair in _near(grams, grams, lambda i, j: i < j) for place in pair}
    return Figures(
        count=len(items),
        opening=_commonest([[words[:4]] for words in skeletons]),
        skeleton=_commonest([[words[i : i + 5] for i in range(len(words) - 4)] for words in skeletons]),
        near_duplicates=len(near) / max(1, len(items)),
        positions=_positions(choices),
        longest=sum(map(_longest, choices)) / len(choices) if choices else None,
    )


def problems(name: str, items: Sequence[Any]) -> list[str]:
    """What is wrong with the file called ``name`` (a key of ``CONTENTS``), one line each; empty when it is fit."""
    content = CONTENTS[name]
    found = [
        problem for place, item in enumerate(items, 1) for problem in _item_problems(content, item, f"{name}:{place}")
    ]
    if found:
        return found
    repeated = [one for one, times in Counter(item["id"] for item in items).items() if times > 1]
    found += [f"{name}: id {one} more than once" for one in repeated]
    subjects = {item.get("subject") for item in items}
    if len(items) < content.least or len(subjects) < content.subjects:
        found.append(
            f"{name}: {len(items)} items and {len(subjects)} subjects, {content.least} and {content.subjects} wanted"
        )
    of_all = figures(items)
    for share, words in (of_all.opening, of_all.skeleton):
        if share > MOST_OF_ONE_WORDING:
            found.append(f"{name}: {share:.1%} of the items have '{words}'")
    if of_all.near_duplicates >= MOST_NEAR_DUPLICATES:
        found.append(f"{name}: {of_all.near_duplicates:.1%} of the items nearly repeat another")
    for ways, shares in of_all.positions.items():
        size = sum(len(item["choices"]) == ways for item in items)
        slack = max(POSITION, 1 / size)  # of a few items no even spread can be asked for
        if any(abs(share - 1 / ways) > slack for share in shares):
            found.append(f"{name}: of {ways} choices the answer is at {', '.join(f'{share:.0%}' for share in shares)}")
    if content.even_lengths and of_all.longest is not None and not LONGEST[0] <= of_all.longest <= LONGEST[1]:
        found.append(f"{name}: the answer is the longest choice in {of_all.longest:.1%}")
    return found


def shared(files: Mapping[str, Sequence[Item]]) -> list[tuple[str, str]]:
    """Ids of items in different files that say nearly the same, or the same; files are compared in pairs."""
    found, names = [], list(files)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            for texts in (whole, asked):
                left, right = ([_grams(texts(item)) for item in files[name]] for name in (one, other))
                pairs = _near(left, right, lambda i, j: True)
                found += [(files[one][i]["id"], files[other][j]["id"]) for i, j in pairs]
    return sorted(set(found))


def _item_problems(content: Content, item: Any, place: str) -> Iterable[str]:
    wrong = type_problem(item, content.form)
    if wrong:
        yield f"{place}: {wrong}"
        return
    for text in _strings(item):
        if not text.strip() or text != text.strip():
            yield f"{place}: {text!r:.60} is empty or has blanks around it"
    if content.form is Choice:
        if len(item["choices"]) not in content.choices or not 0 <= item["answer"] < len(item["choices"]):
            yield f"{place}: {len(item['choices'])} choices, answer {item['answer']}"
        if len(set(item["choices"])) < len(item["choices"]):
            yield f"{place}: a choice stands there more than once"
        elif any(a != b and b.startswith(a) for a in item["choices"] for b in item["choices"]):
            yield f"{place}: a choice is the beginning of another, which no likelihood can prefer to it"
    elif content.form is Short and not 1 <= len(item["answer"].split()) <= WORDS_OF_AN_ANSWER:
        yield f"{place}: {len(item['answer'].split())} words of answer"
    elif content.form is Pair:
        hidden = item["target"].lower()
        if hidden not in item["first"].lower() or hidden in item["second"].lower():
            yield f"{place}: the target is not in the first document, or is in the second"
    elif content.form is Passage:
        least, most = WORDS_OF_A_PASSAGE
        if not least <= len(item["text"].split()) <= most:
            yield f"{place}: {len(item['text'].split())} words"
    elif content.form is Chat:
        roles = [message["role"] for message in item["messages"]]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        alternate = all(role == ("user", "assistant")[turn % 2] for turn, role in enumerate(turns))
        if not set(roles) <= set(get_args(Role)) or not alternate or turns[-1:] != ["user"]:
            yield f"{place}: roles {roles}"


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _skeletons(texts: Sequence[str]) -> list[tuple[str, ...]]:
    words = [_WORD.findall(text) for text in texts]
    plain = {word for text in words for word in text if word.islower()}
    return [_collapsed(_NAME if _is_name(word, plain) else word.lower() for word in text) for text in words]


def _is_name(word: str, plain: set[str]) -> bool:
    return any(letter.isdigit() for letter in word) or (word[0].isupper() and word != "I" and word.lower() not in plain)


def _collapsed(words: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for word in words:
        if word != _NAME or kept[-1:] != [_NAME]:
            kept.append(word)
    return tuple(kept)


def _commonest(grams: Sequence[Iterable[tuple[str, ...]]]) -> tuple[float, str]:
    counts = Counter(gram for item in grams for gram in set(item) if set(gram) != {_NAME})
    if not counts:
        return 0.0, ""
    gram, times = counts.most_common(1)[0]
    return times / len(grams), " ".join(gram)


def _positions(items: Sequence[Item]) -> dict[int, tuple[float, ...]]:
    by_ways: dict[int, list[int]] = defaultdict(list)
    for item in items:
        by_ways[len(item["choices"])].append(item["answer"])
    return {
        ways: tuple(answers.count(place) / len(answers) for place in range(ways))
        for ways, answers in sorted(by_ways.items())
    }


def _longest(item: Item) -> float:
    lengths = [len(choice) for choice in item["choices"]]
    return (lengths[item["answer"]] == max(lengths)) / lengths.count(max(lengths))


def _grams(text: str) -> frozenset[tuple[str, ...]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def _near(
    left: Sequence[frozenset[Any]], right: Sequence[frozenset[Any]], counts: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    holders: dict[Any, list[int]] = defaultdict(list)
    for j, grams in enumerate(right):
        for gram in grams:
            holders[gram].append(j)
    pairs = []
    for i, grams in enumerate(left):
        common = Counter(j for gram in grams for j in holders.get(gram, ()))
        pairs += [(i, j) for j, n in common.items() if counts(i, j) and n / (len(grams) + len(right[j]) - n) > NEAR]
    return pairs

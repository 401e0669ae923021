"""The items the gates measure with are fit for it, and the check that says so can say no."""

import re

import pytest

from cpt_mega.gates.arming import USUAL
from cpt_mega.gates.chats import messages_of
from cpt_mega.gates.item_quality import CONTENTS, figures, problems, read, shared
from cpt_mega.gates.paired import smallest_threshold
from cpt_mega.gates.suite_schema import RuleOptions
from tests.helpers.matrix import README

GATES = README.parent / "configs/gates"
FILES = {path.stem: read(path) for path in sorted((GATES / "items").glob("*.jsonl"))}


def _changed(name, place=0, **fields):
    return [{**item, **fields} if at == place else item for at, item in enumerate(FILES[name])]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_fit_to_measure_with(name):
    assert problems(name, FILES[name]) == []


@pytest.mark.parametrize("name", ["behaviour", "safety"])
def test_every_dialogue_is_one_by_its_turns(name):
    """A user's turn is last, and none is within another."""
    for item in FILES[name]:
        messages, _ = messages_of(item["question"])
        assert messages[-1]["role"] == "user", item["id"]
        assert not re.search(r"^(User|Assistant):", messages[-1]["content"], re.M), item["id"]


def test_no_item_is_in_two_files():
    assert FILES.keys() == CONTENTS.keys()
    assert shared(FILES) == []


def test_the_ready_suites_carry_the_usual_thresholds_in_a_run_of_fifteen_looks():
    shown, lists = 3, 200  # of general.yaml: examples before each question, and items that are made
    items = {bucket: len(FILES[bucket]) for bucket in ("behaviour", "safety")}
    items["general"] = len(FILES["knowledge"]) - shown + len(FILES["reasoning"]) + lists
    for bucket, count in items.items():
        assert smallest_threshold(count, RuleOptions().alpha / len(USUAL), 15) <= USUAL[bucket], bucket


def test_the_page_counts_what_is_there():
    table = re.findall(r"^\| \[(\w+)\.jsonl\]\(items/\1\.jsonl\) \| (\d+) \|", (GATES / "README.md").read_text(), re.M)
    assert {name: int(count) for name, count in table} == {name: len(items) for name, items in FILES.items()}


@pytest.mark.parametrize(
    ("name", "items", "said"),
    [
        ("knowledge", FILES["knowledge"][:100], "100 items"),
        ("knowledge", _changed("knowledge", answer=4), "4 choices, answer 4"),
        ("knowledge", _changed("knowledge", answer="0"), "answer is '0'"),
        ("knowledge", _changed("knowledge", question=" "), "is empty or has blanks"),
        ("knowledge", _changed("knowledge", choices=["a", "b", "c"]), "3 choices"),
        ("knowledge", _changed("knowledge", choices=["a", "b", "c", "a"]), "more than once"),
        ("knowledge", _changed("knowledge", choices=["a", "b", "c", "a d"]), "beginning of another"),
        ("knowledge", _changed("knowledge", id="know-0002"), "id know-0002 more than once"),
        ("knowledge", [{**item, "subject": "all"} for item in FILES["knowledge"]], "1 subjects"),
        ("answers", _changed("answers", answer="one two three four five six seven eight nine"), "9 words of answer"),
        ("answers", _changed("answers", note="x"), "note is unknown"),
        ("boundaries", _changed("boundaries", target="a word that is nowhere"), "not in the first document"),
        ("boundaries", _changed("boundaries", second="The word was Tamarisk"), "is in the second"),
        ("prose", _changed("prose", text="Too short."), "2 words"),
        ("chat", _changed("chat", messages=[{"role": "assistant", "content": "Hello"}]), "roles ['assistant']"),
        ("chat", _changed("chat", messages=[]), "roles []"),
    ],
)
def test_what_is_wrong_with_items_is_said(name, items, said):
    found = problems(name, items)
    assert any(said in problem for problem in found), found


def test_answers_that_give_themselves_away_are_found():
    def placed(item, place):
        rest = [choice for at, choice in enumerate(item["choices"]) if at != item["answer"]]
        return {**item, "choices": [*rest[:place], item["choices"][item["answer"]], *rest[place:]], "answer": place}

    first = [placed(item, 0) for item in FILES["knowledge"]]
    assert problems("knowledge", first) == ["knowledge: of 4 choices the answer is at 100%, 0%, 0%, 0%"]
    longer = [
        {**item, "choices": [c + " indeed" * 9 * (at == item["answer"]) for at, c in enumerate(item["choices"])]}
        for item in FILES["knowledge"]
    ]
    assert any("the longest choice in 100.0%" in problem for problem in problems("knowledge", longer))


def test_items_made_from_a_pattern_are_found():
    states = (
        "Chad",
        "Peru",
        "Oman",
        "Cuba",
        "Mali",
        "Fiji",
        "Togo",
        "Laos",
        "Iran",
        "Iraq",
        "Nauru",
        "Benin",
        "Ghana",
        "Malta",
    )
    made = [
        {**FILES["answers"][at], "question": f"Tell me which town is the seat of {state} since {1900 + at}?"}
        for at, state in enumerate(states)
    ]
    assert problems("answers", FILES["answers"]) == []
    assert figures([*made, *FILES["answers"][14:]]).opening[0] < 0.05
    patterned = [*made, *[{**m, "id": f"x{m['id']}", "question": m["question"] + " Say it."} for m in made]]
    found = problems("answers", [*patterned, *FILES["answers"][28:]])
    assert any("of the items have 'tell me which town'" in problem for problem in found)
    assert any("nearly repeat another" in problem for problem in found)


def test_an_item_that_comes_again_in_another_file_is_found():
    again = {**FILES["answers"][0], "question": FILES["knowledge"][7]["question"].upper()}
    assert shared({**FILES, "answers": [again, *FILES["answers"][1:]]}) == [("ans-0001", "know-0008")]


def test_names_and_numbers_make_no_difference_to_a_wording():
    texts = ("In 1912 the ship Titanic sank off Canada", "In 1943 the ship Bismarck sank off Brest")
    one, other = (figures([{"question": text}]).skeleton for text in texts)
    assert one == other

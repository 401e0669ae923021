"""Items in the shapes that users hold."""

import json

import pytest

from cpt_mega.errors import InputError
from cpt_mega.gates.items import read_answers, read_choices, read_pairs, read_texts


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


MMLU = {"question": "Q?", "choices": ["a", "b"], "answer": 1}
SHAPES = {
    "mmlu": MMLU,
    "letters": MMLU | {"answer": "B"},
    "hellaswag": {"ctx": "Q?", "endings": ["a", "b"], "label": "1"},
    "mmlu_pro": {"question": "Q?", "options": ["a", "b"], "answer": "B", "answer_index": 1},
    "arc": {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "arc_numbers": {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "arc_stem": {
        "question": {"stem": "Q?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
        "answerKey": "B",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_common_benchmarks(tmp_path, shape):
    (item,) = read_choices(written(tmp_path / "x.jsonl", SHAPES[shape]))
    assert (item.question, item.choices, item.answer) == ("Q?", ("a", "b"), 1) and len(item.id) == 16


def test_mmlus_csv(tmp_path):
    (tmp_path / "x.csv").write_text('"What, then?",one,two,three,four,C\n"Two\nlines",1,2,3,4,A\n')
    first, second = read_choices(tmp_path / "x.csv")
    assert first.question == "What, then?" and first.choices[first.answer] == "three"
    assert second.question == "Two\nlines" and second.answer == 0


@pytest.mark.parametrize("text", ['"What is,a,b,A\nq2,a,b,A\n', '"a" b,c,d,A\n', f'"{"x" * 200_000}",a,b,A\n'])
def test_a_csv_that_is_none_is_refused_and_no_rows_are_merged(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match="x.csv:.*CSV"):
        read_choices(tmp_path / "x.csv")


def test_names_are_the_items_own_or_follow_from_what_they_say(tmp_path):
    lines = [MMLU | {"id": "x"}, MMLU, MMLU | {"id": 7, "answer": 0}]
    names = [item.id for item in read_choices(written(tmp_path / "a.jsonl", *lines))]
    again = [item.id for item in read_choices(written(tmp_path / "b.jsonl", *reversed(lines)))]
    assert names == again[::-1] and names[0] == "x" and names[2] == "7"


def test_other_items(tmp_path):
    (answer,) = read_answers(written(tmp_path / "a.jsonl", {"id": "a", "question": "Q?", "answer": "yes"}))
    assert answer.answer == "yes"
    (pair,) = read_pairs(written(tmp_path / "p.jsonl", {"first": "f", "second": "s", "target": "t"}))
    assert (pair.first, pair.second, pair.target) == ("f", "s", "t")
    (text,) = read_texts(written(tmp_path / "t.jsonl", "", {"body": "words"}), "body")
    assert text.text == "words"


BAD = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[1]", "JSON object"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, "question"),
    "no choices": ({"question": "Q?", "answer": 0}, "choices"),
    "one choice": (MMLU | {"choices": ["a"], "answer": 0}, "choices"),
    "empty choice": (MMLU | {"choices": ["a", " "]}, "choices"),
    "equal choices": (MMLU | {"choices": ["a", "a"]}, "twice"),
    "no answer": ({"question": "Q?", "choices": ["a", "b"]}, "letter"),
    "answer behind": (MMLU | {"answer": 2}, "letter"),
    "answer before": (MMLU | {"answer": -1}, "letter"),
    "a truth": (MMLU | {"answer": True}, "letter"),
    "letter behind": (MMLU | {"answer": "C"}, "letter"),
    "choices of numbers": (MMLU | {"choices": [1, 2]}, "choices"),
    "odd stem": (MMLU | {"question": {"stem": 3}}, "question"),
    "no labels": (MMLU | {"choices": {"text": ["a", "b"], "label": None}}, "labels"),
    "half a letter": (MMLU | {"question": "\ud800"}, "surrogates"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_item_is_refused_by_its_line(tmp_path, name):
    line, words = BAD[name]
    with pytest.raises(InputError) as caught:
        read_choices(written(tmp_path / "x.jsonl", MMLU, "", line))
    assert "x.jsonl:3" in str(caught.value) and words in str(caught.value)


def test_an_id_twice_an_empty_file_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="x.jsonl:2.*another item"):
        read_choices(written(tmp_path / "x.jsonl", MMLU | {"id": "a"}, MMLU | {"id": "a", "answer": 0}))
    with pytest.raises(InputError, match="no item"):
        read_choices(written(tmp_path / "y.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        read_choices(tmp_path / "z.jsonl")
    (tmp_path / "w.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(InputError, match="UTF-8"):
        read_choices(tmp_path / "w.jsonl")

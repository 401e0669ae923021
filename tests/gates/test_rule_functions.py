"""Rules of the user's own."""

import pytest

from cpt_mega.errors import InputError
from cpt_mega.gates.rule_functions import load_function, verdict_by_function
from cpt_mega.gates.verdict import LookScores

LOOK = LookScores(7, 700, {"domain": 20.0}, {"domain": 25.0}, {}, {})
CODE = """
def worse(look, history):
    if look.perplexity["domain"] > look.baseline["domain"]:
        return "warn", f"worse after {look.tokens} tokens and {len(history)} looks"

def fine(look, history):
    return None

def odd(look, history):
    return "explode", "now"

def fails(look, history):
    return look.nothing

number = 3
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


def test_a_function_says_what_to_do(rules):
    found = verdict_by_function(rules("worse"), LOOK, [{}])
    assert (found.rule, found.level, found.action) == ("function:worse", "soft", "warn")
    assert found.reason == "worse after 700 tokens and 1 looks"
    found = verdict_by_function(rules("fine"), LOOK, [])
    assert (found.level, found.action) == ("none", "continue")


@pytest.mark.parametrize(("name", "words"), [("odd", "explode"), ("fails", "AttributeError")])
def test_what_a_function_may_not_do_is_one_line(rules, name, words):
    with pytest.raises(InputError, match=words):
        verdict_by_function(rules(name), LOOK, [])


@pytest.mark.parametrize("name", ["nothing", "number"])
def test_a_function_that_is_not_there_is_one_line(rules, name):
    with pytest.raises(InputError, match=r"rules.functions"):
        load_function(rules(name))


def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def (")
    for name in (f"{tmp_path}/broken.py:f", f"{tmp_path}/none.py:f", "no_colon", "x:y"):
        with pytest.raises(InputError, match=r"path/to/file.py:function"):
            load_function(name)

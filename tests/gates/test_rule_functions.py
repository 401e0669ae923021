"""Rules of the user's own."""

import sys

import pytest

from cpt_mega.errors import InputError
from cpt_mega.gates.rule_functions import check_names, function_digest, load_function, verdict_by_function
from cpt_mega.gates.verdict import LookScores
from cpt_mega.lineage import file_digest

LOOK = LookScores(7, 700, {"domain": 20.0}, {"domain": 25.0}, {}, {})
EARLIER = {
    "step": 3,
    "tokens": 300,
    "perplexity": {"domain": 21.0},
    "action": "warn",
    "objections": {"domain_gain": "soft"},
}
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
    found = verdict_by_function(rules("worse"), LOOK, [EARLIER])
    assert (found.rule, found.level, found.action) == ("function:own.worse", "soft", "warn")
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


def test_a_function_sees_of_earlier_looks_what_the_ledger_has_of_them(tmp_path):
    """And cannot change what the run keeps."""
    (tmp_path / "own.py").write_text(
        "def rule(look, history):\n    history[0]['perplexity'].clear()\n    return 'warn', str(sorted(history[0]))"
    )
    kept = EARLIER | {"scores": {"domain": {"gain": 0.1}}, "weights": {"domain": 1.0}, "judged_by": ["domain_gain"]}
    found = verdict_by_function(f"{tmp_path / 'own.py'}:rule", LOOK, [kept])
    assert found.reason == str(sorted(EARLIER)) and kept["perplexity"] == EARLIER["perplexity"]


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Limit:
    most: float = {most}

def rule(look, history):
    return "warn", str(Limit())
"""


def test_files_of_one_name_do_not_meet_and_may_have_dataclasses(tmp_path):
    names = []
    for most in (1.5, 2.5):
        folder = tmp_path / str(most)
        folder.mkdir()
        (folder / "own.py").write_text(DATACLASS.format(most=most))
        names.append(f"{folder / 'own.py'}:rule")
    assert [verdict_by_function(name, LOOK, []).reason for name in names] == ["Limit(most=1.5)", "Limit(most=2.5)"]
    modules = [sys.modules[load_function(name).__module__] for name in names]
    assert modules[0] is not modules[1] and modules[0].Limit().most == 1.5


def test_functions_of_one_name_in_two_files_are_two_rules(tmp_path):
    rules = set()
    for file in ("exams", "drift"):
        (tmp_path / f"{file}.py").write_text("def rule(look, history):\n    return 'stop', 'enough'")
        rules.add(verdict_by_function(f"{tmp_path / file}.py:rule", LOOK, []).rule)
    assert rules == {"function:exams.rule", "function:drift.rule"}
    check_names([f"{tmp_path / 'exams'}.py:rule", f"{tmp_path / 'drift'}.py:rule"])


def test_two_functions_that_verdicts_could_not_tell_apart_are_refused():
    with pytest.raises(InputError, match="is called function:own.rule in verdicts") as refusal:
        check_names(["a/own.py:rule", "a/own.py:other", "b/own.py:rule"])
    assert refusal.value.value == "b/own.py:rule"
    with pytest.raises(InputError, match="and so is a/own.py:rule"):
        check_names(["a/own.py:rule", "a/own.py:rule"])


def test_the_digest_is_that_of_the_code_that_judges(tmp_path):
    """And not of what the file has become meanwhile."""
    file, name = tmp_path / "own.py", f"{tmp_path / 'own.py'}:rule"
    file.write_text("def rule(look, history):\n    return 'warn', 'old'")
    digest = file_digest(file)
    assert verdict_by_function(name, LOOK, []).reason == "old"
    file.write_text("def rule(look, history):\n    return 'warn', 'new'")
    assert function_digest(name) == digest != file_digest(file)
    assert function_digest(f"{tmp_path / 'gone.py'}:rule") is None

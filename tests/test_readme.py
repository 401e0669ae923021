"""The README says what the tests say, and its links lead somewhere."""

import re

from tests.engine.test_parity import _pairs
from tests.engine.test_training import _enumerated
from tests.helpers.matrix import README, Matrix, written_table


def test_the_matrix_is_that_of_the_tests():
    matrix = Matrix()
    for test, parameters in (("test_logprobs_equal_transformers", _pairs()), ("test_steps", _enumerated())):
        file = "test_parity" if test == "test_logprobs_equal_transformers" else "test_training"
        for name, layout in (parameter.values for parameter in parameters):
            matrix.add(f"tests/engine/{file}.py::{test}[{name}-{layout}]", passed=True)
    assert written_table() == matrix.table()


def test_a_failure_shows_in_the_matrix():
    matrix = Matrix()
    matrix.add("tests/engine/test_parity.py::test_logprobs_equal_transformers[llama-tp2]", passed=True)
    matrix.add("tests/engine/test_parity.py::test_logprobs_equal_transformers[llama_tied-tp2]", passed=False)
    assert matrix.table().endswith("| TP 2 | FAILED |")


def test_links_lead_somewhere():
    for page in [README, *README.parent.glob("*/README.md"), *README.parent.glob("cpt_mega/*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"

"""Verdicts from numbers."""

import math

import pytest

from cpt_mega.gates.rules import general_perplexity


@pytest.mark.parametrize(
    ("after", "action"), [(9.0, "continue"), (11.5, "continue"), (11.6, "stop"), (math.inf, "stop"), (math.nan, "stop")]
)
def test_general_perplexity_may_rise_by_the_limit_and_no_more(after, action):
    verdict = general_perplexity({"general": 10.0, "domain": 5.0}, {"general": after, "domain": 99.0}, 0.15)
    assert verdict.action == action
    assert verdict.numbers["baseline"] == 10.0
    assert "step-0 value 10" in verdict.reason and "+15%" in verdict.reason


def test_without_a_general_bucket_there_is_no_verdict():
    assert general_perplexity({"domain": 5.0}, {"domain": 6.0}, 0.15) is None

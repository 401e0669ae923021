"""Which checkpoints are good."""

import math

from cpt_mega.gates.selection import best_step, healthy_steps


def _look(step, action="continue", **perplexity):
    return {"step": step, "tokens": step * 10, "perplexity": perplexity, "action": action}


def test_the_best_has_the_lowest_domain_perplexity_and_no_objection():
    history = [
        _look(1, domain=9.0, general=1.0),
        _look(2, domain=7.0),
        _look(3, domain=5.0, action="stop"),
        _look(4, domain=8.0),
    ]
    assert best_step(history, {1, 2, 3, 4}) == 2
    assert best_step(history, {1, 3, 4}) == 4
    assert best_step(history, {3}) is None and best_step([], {1}) is None


def test_without_a_domain_the_general_bucket_decides_and_the_later_of_two_equals():
    assert best_step([_look(1, general=3.0), _look(2, general=3.0), _look(3, general=math.inf)], {1, 2, 3}) == 2


def test_looks_without_a_rule_can_be_best_but_are_not_healthy():
    history = [_look(1, "none", domain=3.0), _look(2, domain=4.0), _look(3, "stop", domain=1.0)]
    assert best_step(history, {1, 2, 3}) == 1 and healthy_steps(history) == [2]

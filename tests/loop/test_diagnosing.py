"""A run's own numbers, where its folder has seen more than this run."""

import shutil

from cpt_mega.loop.diagnosing import found_and_refused, has_template_of
from tests.helpers.models import tiny_tokenizer


def start(step: int, same_run: bool = True) -> dict:
    return {"kind": "restore", "step": step, "mode": "full" if step else "weights", "same_run": same_run}


def odd(step: int, action: str = "log") -> dict:
    return {"kind": "odd_row", "step": step, "action": action}


def refused(step: int) -> dict:
    return {"kind": "anomaly", "action": "skip", "step": step}


def test_what_a_run_went_back_behind_and_an_earlier_run_found_do_not_count():
    lines = [start(0, False), odd(2), odd(4), odd(4, "skip"), refused(3), refused(5), refused(6)]
    assert found_and_refused(lines) == (3, 3)  # a row that is left out is no update that was refused
    lines += [start(4), refused(5)]
    assert found_and_refused(lines) == (3, 2)
    lines += [start(2)]
    assert found_and_refused(lines) == (1, 0)
    assert found_and_refused([*lines, start(0, False), refused(1)]) == (0, 1)
    assert found_and_refused([*lines, start(8, False), odd(9)]) == (1, 0)  # on from another folder's checkpoint


def test_the_template_is_known_where_the_checkpoint_that_a_run_started_from_is_gone(tmp_path):
    run, origin = tmp_path / "run", tmp_path / "run" / "checkpoints" / "iter_0000004"
    assert not has_template_of(run, origin)
    tiny_tokenizer(origin / "hf", 300)
    assert has_template_of(run, origin)
    shutil.copytree(origin / "hf", run / "model" / "hf")
    shutil.rmtree(origin)
    assert has_template_of(run, origin)

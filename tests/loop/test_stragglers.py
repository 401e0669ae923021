"""Who the others wait for."""

import pytest

from cpt_mega.loop.stragglers import slow_ranks
from tests.helpers.jobsite import metrics


def test_processes_of_a_stage_are_compared():
    assert slow_ranks([0, 0, 1, 1], [1.0, 1.1, 3.0, 3.1]) == {}
    assert slow_ranks([0, 0, 0, 0], [1.0, 1.0, 2.0, 1.1]) == {2: 2.0}
    assert slow_ranks([0, 0, 1, 1], [1.0, 2.0, 3.0, 6.0]) == {1: 2.0, 3: 2.0}
    assert slow_ranks([0, 0], [0.001, 0.002]) == {}  # too little to say anything


@pytest.mark.parametrize("words", [[], ["train.distributed_optimizer=false"]])
def test_a_slow_process_is_named(workers, jobsite, tmp_path, words):
    words = [f"run.dir={tmp_path}", "logging.rank_interval_steps=2", "eval.sets=[]", *words]
    workers(2).run("train_with_a_slow_process", config=jobsite.config, overrides=words, slow_s=0.2)
    lines = metrics(tmp_path, "ranks")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["slow"] == [1] and line["own_s"][1] > line["own_s"][0] + 0.1


def test_nobody_is_compared_where_it_is_switched_off(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path}", "logging.rank_interval_steps=null", "eval.sets=[]", "train.tokens=600"]
    workers(2).run("train_with_a_slow_process", config=jobsite.config, overrides=words, slow_s=0.01)
    assert metrics(tmp_path, "ranks") == []

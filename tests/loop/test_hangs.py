"""A process that hangs: a fault in time, and where each process was."""

import pytest

from tests.helpers.workers import JobFailed


def test_a_process_that_hangs_is_a_fault_that_says_where_each_one_was(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path}", "run.timeout_s=4", "eval.sets=[]"]
    with pytest.raises(JobFailed, match="no step ended for 3 s; a process hung or was lost") as failure:
        workers(2).run("train_with_a_process_that_hangs", config=jobsite.config, overrides=words, rows=10, hangs_s=8)
    assert failure.value.kind == "FaultError"
    stacks = [(tmp_path / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert all(text.startswith("Timeout (0:00:03") for text in stacks)
    assert "in hanging" in stacks[1] and "in hanging" not in stacks[0]
    workers(2).run("train", config=jobsite.config, overrides=words)  # what the next start says does not take its place
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == [f"rank_0000{n}.before.txt" for n in (0, 1)]


def test_a_step_that_was_only_slow_is_no_hang(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path}", "run.timeout_s=20", "run.start_timeout_s=20", "eval.sets=[]"]
    with pytest.raises(JobFailed, match="the disk is gone") as failure:
        workers(1).run("train_slowly_and_fail", config=jobsite.config, overrides=words, rows=10, slow_s=1.5)
    assert failure.value.kind == "OSError" and list((tmp_path / "stacks").iterdir()) == []


def test_a_run_with_nothing_wrong_leaves_no_stacks(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path}", "train.tokens=200", "schedule.warmup_tokens=0", "eval.sets=[]"]
    workers(2).run("train", config=jobsite.config, overrides=words)
    assert list((tmp_path / "stacks").iterdir()) == []

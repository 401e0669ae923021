"""Asked to end at any moment: a checkpoint at the next boundary, on all ranks, and the same command goes on bit for bit."""

import pytest

from cpt_mega.loop.comparison import compare_runs
from tests.helpers.jobsite import metrics, status

WORDS = ["checkpoint.interval_tokens=400", "eval.interval_tokens=500"]


@pytest.fixture(scope="module")
def through(workers, jobsite, tmp_path_factory):
    run = tmp_path_factory.mktemp("signals") / "through"
    workers(2).run("train", config=jobsite.config, overrides=[f"run.dir={run}", *WORDS])
    return run


@pytest.mark.parametrize(
    ("moment", "asynchronous"),
    [
        ("start-up", "true"),
        ("evaluation", "true"),
        ("save", "true"),
        pytest.param("loader", "true", marks=pytest.mark.full),
        pytest.param("save", "false", marks=pytest.mark.full),
    ],
)
def test_a_signal_to_one_process_at_any_moment(workers, jobsite, tmp_path, through, moment, asynchronous):
    run = tmp_path / "run"
    words = [f"run.dir={run}", *WORDS, f"checkpoint.asynchronous={asynchronous}"]
    outcomes = workers(2).run("train_and_signal", config=jobsite.config, overrides=words, moment=moment)
    assert [state for state, _ in outcomes] == ["preempted"] * 2 and outcomes[1][1] == "received SIGTERM"
    ended = status(run)
    assert (ended["exit_code"], ended["reason"]) == (75, "received a signal on another rank")
    saved = (run / "checkpoints" / f"iter_{ended['step']:07d}" / "COMPLETE").is_file()
    assert (
        saved if moment not in ("start-up", "evaluation") else ended["step"] == 0
    )  # before the first step there is nothing
    assert ended["step"] < metrics(through, "train")[-1]["step"]
    workers(2).run("train", config=jobsite.config, overrides=words)
    found = compare_runs(through, run)
    assert found.is_exact, found.first
    assert found.metrics.common == len(metrics(through, "train")) and found.weights.checkpoints


def test_a_look_that_a_signal_ended_is_taken_by_the_next_start(workers, jobsite, tmp_path, through):
    """The last one, so that nothing else is left to do."""
    run = tmp_path / "run"
    words, last = [f"run.dir={run}", *WORDS], metrics(through, "eval")[-1]
    outcomes = workers(2).run("train_and_signal", config=jobsite.config, overrides=words, moment="last evaluation")
    assert [state for state, _ in outcomes] == ["preempted"] * 2 and status(run)["exit_code"] == 75
    assert status(run)["step"] == last["step"] > metrics(run, "eval")[-1]["step"]
    assert workers(2).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"
    assert metrics(run, "eval") == metrics(through, "eval") and compare_runs(through, run).is_exact


def test_a_second_interrupt_waits_for_nothing(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    [(code, seconds)] = workers(1).run(
        "interrupt_twice_in_the_loader", config=jobsite.config, overrides=[f"run.dir={run}"]
    )
    assert code == 75 and seconds < 5
    assert (status(run)["state"], status(run)["reason"]) == ("preempted", "interrupted")
    assert workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={run}"])[0][0] == "finished"

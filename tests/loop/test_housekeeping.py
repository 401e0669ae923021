"""Garbage collection, replica checks, time-outs and profiles in a run."""

import json

from tests.helpers.jobsite import metrics


def test_a_profile_of_some_steps(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    words = [f"run.dir={run}", "profile.start=2", "profile.end=3", "profile.ranks=[1]"]
    workers(2).run("train", config=jobsite.config, overrides=words)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "rank1_steps2-3.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= names


def test_checks_and_collections_change_nothing(workers, jobsite, tmp_path):
    """Every step and never: the same bits."""
    often = ["train.gc_interval_steps=1", "train.replica_check_steps=1", "run.timeout_s=60"]
    never = ["train.gc_interval_steps=0", "train.replica_check_steps=null"]
    losses = []
    for name, words in (("often", often), ("never", never)):
        workers(2).run("train", config=jobsite.config, overrides=[f"run.dir={tmp_path / name}", *words])
        losses.append([line["loss"] for line in metrics(tmp_path / name, "train")])
    assert losses[0] == losses[1]


def test_the_garbage_collector_is_given_back(workers):
    assert workers(1).run("collector_states", interval=5) == [[True, False, True]]
    assert workers(1).run("collector_states", interval=0) == [[True, True, True]]


def test_after_the_start_a_missing_process_is_noticed_sooner(workers):
    """The groups start with the long time-out; once it is shortened, waiting for a process that does not come ends."""
    waited, _ = workers(2).run("wait_for_a_process_that_does_not_come", limit_s=2, absent_s=6)
    assert waited is not None and 1 <= waited < 5

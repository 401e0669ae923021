"""The guard in a run: what is refused, what is done about it, what the ledger says, and that it can be told again."""

import json
import random

import pytest
import torch

from cpt_mega.loop.replay import Replay
from tests.helpers.jobsite import checkpoint_tensors, metrics, status, write_documents
from tests.helpers.workers import JobFailed

# As many steps as the detector needs, and some to come after; few micro-batches, for speed.
STEPS = ["train.tokens=7200", "schedule.warmup_tokens=0", "schedule.kind=constant", "optimizer.lr=1e-3"]
STEPS += ["train.micro_batch_size=4"]
FEW = ["train.tokens=1500"]
LAYOUTS = {
    "one": (1, []),
    "one_bf16": (1, ["precision=bf16"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "dp2": (2, []),
    "dp2_bf16": (2, ["precision=bf16"]),
    "dp2_replicated_optimizer": (2, ["train.distributed_optimizer=false"]),
}
MARKS = {
    "pp2_vpp2-nan": [],
    "dp2-bit": [pytest.mark.versions],
    "dp2_replicated_optimizer-nan": [],
}  # the others take long
CASES = [(layout, how) for layout in LAYOUTS for how in ("nan", "bit")]


def ledger(run, kind="anomaly") -> list[dict]:
    lines = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def last_checkpoint(run) -> dict:
    return checkpoint_tensors(max((run / "checkpoints").glob("iter_*")))


def same(run, other) -> None:
    one, two = last_checkpoint(run), last_checkpoint(other)
    assert one.keys() == two.keys() and any(".exp_avg." in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def spoiled(workers, jobsite, run, how, steps, *words, world=2):
    """A run that something goes wrong in; the state it ended in, its steps and its ledger's lines."""
    words = [f"run.dir={run}", *STEPS, *words]
    (state, _), *_ = workers(world).run("train_spoiled", config=jobsite.config, overrides=words, how=how, steps=steps)
    return state, metrics(run, "train"), ledger(run)


@pytest.mark.parametrize(
    ("layout", "how"),
    [pytest.param(*case, id="-".join(case), marks=MARKS.get("-".join(case), [pytest.mark.full])) for case in CASES],
)
def test_an_update_is_refused_on_all_ranks_and_leaves_the_optimizer_as_it_was(workers, jobsite, tmp_path, layout, how):
    """A gradient is spoilt on one rank: that run, and one that only skips the step by its ledger, are the same, bit for bit."""
    world, words = LAYOUTS[layout]
    state, lines, decided = spoiled(workers, jobsite, tmp_path / "a", how, [4], *FEW, *words, world=world)
    assert state == "finished" and [line["step"] for line in lines if line["refused"]] == [4]
    (line,) = decided
    assert (line["action"], line["step"]) == ("skip", 4) and len(line["rows"]) == 8
    assert all(row["documents"] and not row["blamed"] for row in line["rows"])
    assert lines[3]["tokens"] - lines[3]["tokens_trained"] == line["tokens"] > 0
    assert all(a["tokens"] - a["tokens_trained"] in (0, line["tokens"]) for a in lines)
    words = [f"run.dir={tmp_path / 'b'}", *STEPS, *FEW, *words, f"anomaly.replay={tmp_path / 'a' / 'ledger.jsonl'}"]
    workers(world).run("train", config=jobsite.config, overrides=words)
    same(tmp_path / "a", tmp_path / "b")


def test_spoilt_weights_are_rolled_back_and_the_run_ends_as_if_nothing_had_been(workers, jobsite, tmp_path):
    """The rate stays and no row can be blamed, so the weights must be those of a run that was never spoilt."""
    words = ["anomaly.lr_factor=1", "checkpoint.interval_tokens=2000"]
    state, lines, decided = spoiled(workers, jobsite, tmp_path / "a", "weight", [22], *words)
    assert state == "finished" and [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not any(line["refused"] for line in lines)  # of the run as it became; the ledger has the rest
    (back,) = ledger(tmp_path / "a", "rollback")
    assert back["to_step"] < 22 and back["step"] == 27 and back["exclude"] == {} and back["number"] == 1
    assert [line["step"] for line in decided if line["action"] == "skip"] == list(range(22, 28))
    whole = [f"run.dir={tmp_path / 'b'}", *STEPS, *words]
    workers(2).run("train", config=jobsite.config, overrides=whole)
    same(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "a" / "checkpoints").glob(".building*"))


def test_a_rate_that_is_far_too_high_lowers_itself_or_stops_the_run_before_it_is_lost(workers, jobsite, tmp_path):
    words = ["checkpoint.interval_tokens=1000", "optimizer.lr=1", "eval.interval_tokens=null"]
    words += ["gates.general_perplexity_limit=null"]
    state, lines, decided = spoiled(workers, jobsite, tmp_path, "rate", list(range(15, 1000)), *words)
    assert state == "gate_stop" and status(tmp_path)["exit_code"] == 80
    assert "lower optimizer.lr" in status(tmp_path)["reason"]
    assert {line["action"] for line in decided} >= {"skip", "lower_lr"}


def test_a_run_without_an_older_checkpoint_stops_and_says_what_to_look_at(workers, jobsite, tmp_path):
    state, lines, decided = spoiled(workers, jobsite, tmp_path, "nan", list(range(1, 100)), world=1)
    assert state == "gate_stop" and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "no checkpoint is older" in status(tmp_path)["reason"]
    assert all(line["grad_norm"] is None for line in lines)
    tensors, base = last_checkpoint(tmp_path), checkpoint_tensors(jobsite.checkpoint)
    assert all(torch.equal(tensors[name], base[name]) for name in base)


def test_what_is_only_logged_changes_nothing_and_what_is_not_finite_ends_the_run(workers, jobsite, tmp_path):
    state, lines, decided = spoiled(workers, jobsite, tmp_path / "a", "weight", [22], "anomaly.action=log", world=1)
    assert state == "finished" and not any(line["refused"] for line in lines)
    assert decided and {line["action"] for line in decided} == {"log"}
    with pytest.raises(JobFailed, match="gradient norm is inf at step 5: nothing was saved"):
        spoiled(workers, jobsite, tmp_path / "b", "nan", [5], "anomaly.action=log", world=1)


def test_what_a_replayed_ledger_does_not_have_is_a_fault_and_what_is_no_ledger_is_refused(workers, jobsite, tmp_path):
    spoiled(workers, jobsite, tmp_path / "a", "nan", [3], *FEW, world=1)
    told = f"anomaly.replay={tmp_path / 'a' / 'ledger.jsonl'}"
    with pytest.raises(JobFailed, match="gradient norm is inf at step 5"):
        spoiled(workers, jobsite, tmp_path / "b", "nan", [3, 5], *FEW, told, world=1)
    for path in (tmp_path / "a" / "metrics.jsonl", tmp_path / "none", tmp_path):
        with pytest.raises(JobFailed, match="anomaly.replay = .* is no run's ledger"):
            spoiled(workers, jobsite, tmp_path / "c", "nan", [3], *FEW, f"anomaly.replay={path}", world=1)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Words for a run on corpora that count upwards, which is soon learnt, and whose later part is noise."""
    folder = tmp_path_factory.mktemp("poisoned")
    counting = [[*((start + n) % 250 + 1 for n in range(31)), 0] for start in range(0, 250 * 8, 7)]
    draw = random.Random(7)
    write_documents(folder / "good", counting * 4)
    write_documents(folder / "bad", [[*(draw.randrange(1, 250) for _ in range(31)), 0] for _ in range(10)])
    sources = "[{name: good, path: %s, role: domain}, {name: bad, path: %s, role: replay}]"
    points = [(0, "good: 1"), (20000, "good: 1"), (20001, "good: 1, bad: 0.03")]
    curriculum = ", ".join(f"{{tokens: {tokens}, weights: {{{weights}}}}}" for tokens, weights in points)
    return [
        "data.sources=" + sources % (folder / "good", folder / "bad"),
        f"data.curriculum=[{curriculum}]",
        "data.max_epochs=1",
        "data.at_max_epochs=drop",
        "train.tokens=29000",
        "train.micro_batch_size=8",
        "schedule.warmup_tokens=0",
        "optimizer.lr=1e-2",
        "eval.sets=[]",
        "checkpoint.rolling_interval_tokens=9000",
        "anomaly.roll_back_after=4",
    ]


@pytest.mark.full
def test_a_poisoned_run_goes_back_leaves_out_what_poisoned_it_and_can_be_told_again(
    workers, jobsite, tmp_path, poisoned
):
    words = [f"run.dir={tmp_path / 'a'}", *poisoned]
    assert workers(1).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"
    lines, backs, decided = metrics(tmp_path / "a", "train"), ledger(tmp_path / "a", "rollback"), ledger(tmp_path / "a")
    assert backs and [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    blamed = {row["source"] for line in decided if line["action"] == "skip" for row in line["rows"] if row["blamed"]}
    assert blamed == {"bad"}  # of batches that were good for the rest
    assert set(backs[-1]["exclude"]["bad"]) >= set(backs[0]["exclude"]["bad"]) and len(backs[0]["exclude"]["bad"]) == 4
    told = [f"run.dir={tmp_path / 'b'}", *poisoned, f"anomaly.replay={tmp_path / 'a' / 'ledger.jsonl'}"]
    assert workers(1).run("train", config=jobsite.config, overrides=told)[0][0] == "finished"
    assert not ledger(tmp_path / "b", "rollback")
    again = metrics(tmp_path / "b", "train")
    fields = ("step", "tokens", "tokens_trained", "loss", "grad_norm", "lr", "tokens_by_source")
    assert [[line[f] for f in fields] for line in again] == [[line[f] for f in fields] for line in lines]
    same(tmp_path / "a", tmp_path / "b")


def test_a_save_under_way_takes_no_checkpoint_away_that_a_rollback_needs(workers, jobsite, tmp_path):
    """One rolling checkpoint stays, and those of the episode are newer."""
    words = ["checkpoint.rolling_interval_tokens=800", "checkpoint.keep_rolling=1", "train.tokens=5000", "eval.sets=[]"]
    state, lines, decided = spoiled(workers, jobsite, tmp_path, "nan", list(range(8, 14)), *words, world=1)
    (back,) = ledger(tmp_path, "rollback")
    assert state == "finished" and back["to_step"] == 7 and back["exclude"] == {}
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    sessions = ledger(tmp_path, "restore")
    assert [line["step"] for line in sessions] == [0, 7] and status(tmp_path)["run_id"] == back["run_id"]


@pytest.mark.parametrize("target_is", [pytest.param("whole", marks=pytest.mark.full), "damaged"])
def test_a_rollback_that_a_kill_came_between_is_finished_by_the_next_start(workers, jobsite, tmp_path, target_is):
    """All that there is of it is its line in the ledger. Where its checkpoint is damaged, it goes further back."""
    words = [f"run.dir={tmp_path}", *STEPS, "train.tokens=3000", "checkpoint.interval_tokens=1000"]
    workers(1).run("train", config=jobsite.config, overrides=words)
    before = metrics(tmp_path, "train")
    first, target = (next(line["step"] for line in before if line["tokens"] >= tokens) for tokens in (1000, 2000))
    start = target if target_is == "whole" else first
    drawn = {row for step in range(target + 1, target + 3) for row in rows_of(tmp_path, step)}
    line = {"kind": "rollback", "run_id": status(tmp_path)["run_id"], "number": 1, "step": before[-1]["step"]}
    exclude = {source: [row for name, row in drawn if name == source] for source in {name for name, _ in drawn}}
    exclude |= {"gone": [1], "replay": list(range(10_000))}  # of a source that is left out today, and all of one
    drawn = {(name, row) for name, row in drawn if name != "replay"}
    more = {"to_step": target, "exclude": exclude, "lr_scale": 0.5, "calm_step": target + 2}
    with open(tmp_path / "ledger.jsonl", "a") as stream:
        stream.write(json.dumps({**line, **more}) + "\n")
    if target_is == "damaged":
        file = tmp_path / "checkpoints" / f"iter_{target:07d}" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    assert workers(1).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"
    lines, kept = metrics(tmp_path, "train"), sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert any(name.startswith(".rolled_back_1-iter_") for name in kept)
    assert lines[:start] == before[:start]
    lowered = [line["step"] for line in lines if line["lr"] == 5e-4]
    assert lowered == list(range(start + 1, target + 3)) and lines[-1]["lr"] == 1e-3
    assert not drawn & {row for step in range(start + 1, len(lines) + 1) for row in rows_of(tmp_path, step)}
    assert lines[-1]["tokens"] >= 3000
    workers(1).run("train", config=jobsite.config, overrides=words)  # and only once
    assert metrics(tmp_path, "train") == lines
    if target_is == "damaged":
        told = [f"run.dir={tmp_path / 'told'}", *words[1:], f"anomaly.replay={tmp_path / 'ledger.jsonl'}"]
        assert workers(1).run("train", config=jobsite.config, overrides=told)[0][0] == "finished"
        assert [line["tokens_by_source"] for line in metrics(tmp_path / "told", "train")] == [
            line["tokens_by_source"] for line in lines
        ]
        assert [line["loss"] for line in metrics(tmp_path / "told", "train")] == [line["loss"] for line in lines]


def rows_of(run, step) -> list[tuple[str, int]]:
    return [(row.source, row.row) for row in Replay(run).rows_of(step)]

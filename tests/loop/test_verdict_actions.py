"""What verdicts do to real runs: go back with a lower rate and more replay, come to an early end, and survive a kill."""

import json
import re
import shutil

import pytest
import torch

from cpt_mega.checkpoint.trainer_state import read_state
from cpt_mega.errors import InputError
from cpt_mega.loop.run_folder import read_lines
from cpt_mega.loop.verdict_replay import take_again
from tests.helpers.jobsite import checkpoint_tensors, metrics, status

# A rate that rises until general perplexity does: healthy at the first look, above the limit at the second.
HARMFUL = [
    "train.tokens=2500",
    "optimizer.lr=0.3",
    "schedule.warmup_tokens=2500",
    "eval.interval_tokens=400",
    "eval.dense_start=false",
    "checkpoint.interval_tokens=400",
    "gates.general_perplexity_limit=0.15",
    "gates.lr_factor=0.05",
    "anomaly.action=off",
]


def ledger(run, *kinds: str) -> list[dict]:
    return [line for line in read_lines(run / "ledger.jsonl") if line["kind"] in kinds]


def trained(workers, jobsite, run, *words, world=1) -> str:
    told = [f"run.dir={run}", *words]
    return workers(world).run("train", config=jobsite.config, overrides=told)[0][0]


def newest(run):
    return sorted((run / "checkpoints").glob("iter_*"))[-1]


def same(a, b) -> None:
    ours, theirs = checkpoint_tensors(newest(a)), checkpoint_tensors(newest(b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def harmed(workers, jobsite, tmp_path_factory):
    """A run of two ranks that a gate rolls back once."""
    run = tmp_path_factory.mktemp("harmed") / "run"
    assert trained(workers, jobsite, run, *HARMFUL, "parallel.tp=2", "gates.action=roll_back", world=2) == "finished"
    return run


def test_harm_rolls_the_run_back_to_a_healthy_checkpoint_at_a_lower_rate_with_more_replay(harmed):
    (back,) = ledger(harmed, "rollback")
    looks = ledger(harmed, "verdict")
    at = next(number for number, look in enumerate(looks) if look["action"] == "roll_back")
    assert looks[at]["step"] == back["step"] > back["to_step"] == looks[at - 1]["step"]
    assert looks[at - 1]["action"] == "continue" and back["reason"] == looks[at]["verdicts"][0]["reason"]
    assert {look["action"] for look in looks[at + 1 :]} == {"continue"}
    assert back["steering"]["lr_scale"] == 0.05 and back["exclude"] == {}
    assert back["raised_replay"] == 0.1 and back["by"] == "gates"
    lines = metrics(harmed, "train")
    rates = [line["lr"] / line["tokens"] for line in lines]  # of a rate that rises with the tokens
    first, later = rates[: back["to_step"]], rates[back["to_step"] :]
    assert first == pytest.approx([0.3 / 2500] * len(first)) and later[:-1] == pytest.approx(
        [0.015 / 2500] * (len(later) - 1)
    )
    replayed, since = (lines[at]["tokens_by_source"] for at in (back["to_step"] - 1, -1))
    share = (since["replay"] - replayed["replay"]) / (sum(since.values()) - sum(replayed.values()))
    assert share == pytest.approx(0.3, abs=0.03)
    state = read_state(newest(harmed))
    assert state.steering["rollbacks"] == 1 and state.stream["raised"] == 0.1
    assert status(harmed)["state"] == "finished" and "roll_back" not in {look["action"] for look in state.gate_history}


def test_a_rollback_of_a_gate_that_a_kill_came_behind_is_finished_by_the_next_start(workers, jobsite, harmed, tmp_path):
    """All that there is of it is its line; what was saved after the checkpoint is set aside."""
    run = tmp_path / "run"
    words = [*HARMFUL, "parallel.tp=2"]
    assert trained(workers, jobsite, run, *words, world=2) == "gate_stop"
    (back,) = ledger(harmed, "rollback")
    assert status(run)["step"] == back["step"]
    with open(run / "ledger.jsonl", "a") as stream:
        stream.write(json.dumps(back | {"run_id": status(run)["run_id"]}) + "\n")
    assert trained(workers, jobsite, run, *words, "gates.action=roll_back", world=2) == "finished"
    assert any(path.name.startswith(".rolled_back_1-iter_") for path in (run / "checkpoints").iterdir())
    same(run, harmed)
    fields = ("step", "tokens", "loss", "grad_norm", "lr")
    ours, theirs = ([[line[f] for f in fields] for line in metrics(folder, "train")] for folder in (run, harmed))
    assert ours == theirs


def test_every_decision_is_taken_again_from_what_the_run_wrote_down(harmed):
    found = take_again(harmed)
    assert [one.action for one in found] == [line["action"] for line in ledger(harmed, "verdict")]
    assert "roll_back" in {one.action for one in found} and not any(one.difference for one in found)
    assert all(line["look_s"] > 0 for line in ledger(harmed, "baseline", "verdict"))


@pytest.mark.parametrize(("file", "which", "old", "new"), [
    ("ledger.jsonl", '"verdict"', '"action": "continue"', '"action": "warn"'),
    ("ledger.jsonl", '"verdict"', r'("rise": -?\d\.\d*)1', r"\g<1>2"),
    ("ledger.jsonl", '"kind": "gates"', '"perplexity_limit": 0.15', '"perplexity_limit": 0.16'),
    ("items.jsonl", '"step": 4', r'("nll": \d+\.\d*)1', r"\g<1>2"),
])  # fmt: skip
def test_a_decision_that_does_not_come_out_as_the_ledger_says_is_named(harmed, tmp_path, file, which, old, new):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("ledger.jsonl", "items.jsonl"):
        shutil.copy(harmed / name, run / name)
    lines = (run / file).read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if which in line and re.search(old, line))
    lines[at] = re.sub(old, new, lines[at], count=1)
    (run / file).write_text("".join(line + "\n" for line in lines))
    found = [one for one in take_again(run) if one.difference]
    assert found and "the ledger says" in found[0].difference


def test_what_is_no_run_with_verdicts_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no ledger.jsonl with a verdict"):
        take_again(tmp_path)
    (tmp_path / "ledger.jsonl").write_text('{"kind": "verdict", "step": 1}\n')
    with pytest.raises(InputError, match="does not say what its verdicts were taken on"):
        take_again(tmp_path)


def test_without_more_rollbacks_the_run_stops(workers, jobsite, tmp_path):
    assert (
        trained(workers, jobsite, tmp_path, *HARMFUL, "gates.action=roll_back", "gates.most_rollbacks=0") == "gate_stop"
    )
    assert not ledger(tmp_path, "rollback") and status(tmp_path)["exit_code"] == 80
    assert "no rollback: 0 were made" in status(tmp_path)["reason"]


def test_harm_at_the_first_look_goes_back_to_the_base(workers, jobsite, tmp_path):
    """The rate that a base cannot stand shows at once; from its own weights the run is one at the lower rate."""
    words = ["gates.action=roll_back", "optimizer.lr=3.0", "gates.lr_factor=0.001", "schedule.warmup_tokens=0"]
    assert trained(workers, jobsite, tmp_path / "run", *HARMFUL, *words) == "finished"
    (back,) = ledger(tmp_path / "run", "rollback")
    assert back["to_step"] == 0 and metrics(tmp_path / "run", "train")[0]["step"] == 1
    assert not (tmp_path / "run" / "checkpoints" / "iter_0000000").exists()  # later looks were passed
    assert {look["action"] for look in ledger(tmp_path / "run", "verdict")[1:]} == {"continue"}
    assert metrics(tmp_path / "run", "train")[0]["lr"] == pytest.approx(0.003, rel=0.05)  # and not 3


@pytest.mark.full
def test_a_fork_goes_back_to_what_it_began_from(workers, jobsite, tmp_path):
    """What was passed before lies in another folder."""
    first, fork = tmp_path / "first", tmp_path / "fork"
    calm = [*HARMFUL, "schedule.warmup_tokens=0", "eval.interval_tokens=800", "checkpoint.interval_tokens=800"]
    assert trained(workers, jobsite, first, *calm, "optimizer.lr=1e-6", "train.tokens=800") == "finished"
    origin = newest(first)
    words = [*calm, "gates.action=roll_back", "gates.lr_factor=0.0001", "restore.mode=auto"]
    words += [f"model.checkpoint={origin}", "restore.accept=[train.tokens,schedule,optimizer,gates]"]
    fork.mkdir()
    (fork / "STOP").touch()
    begun = [*words, "optimizer.lr=1e-6", "restore.mode=full"]
    assert trained(workers, jobsite, fork, *begun) == "preempted"
    start = fork / "checkpoints" / origin.name
    assert read_state(start).kind == "start" and read_state(start).first_step == read_state(origin).step
    ours, theirs = checkpoint_tensors(start), checkpoint_tensors(origin)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trained(workers, jobsite, fork, *words, "optimizer.lr=3.0") == "finished"
    assert ledger(fork, "rollback")[0]["to_step"] == read_state(origin).step


def test_a_model_that_no_rule_has_anything_to_say_about_is_not_objected_to(workers, jobsite, tmp_path):
    """Judged alone, as a gates-only job does it: exit code 80 is for a gate that objects."""
    words = [*HARMFUL, "optimizer.lr=1e-6", "gates.general_perplexity_limit=null"]
    assert (
        trained(workers, jobsite, tmp_path / "run", *words, "train.tokens=500", "schedule.warmup_tokens=0")
        == "finished"
    )
    alone = ["train.tokens=0", f"model.checkpoint={newest(tmp_path / 'run')}"]
    assert trained(workers, jobsite, tmp_path / "judged", *words, *alone) == "finished"
    assert ledger(tmp_path / "judged", "verdict")[-1]["action"] == "none"


def test_without_a_checkpoint_to_go_back_to_the_run_stops(workers, jobsite, tmp_path):
    """One that was begun without: its gates were told to stop."""
    words = [*HARMFUL, "optimizer.lr=3.0", "schedule.warmup_tokens=0"]
    assert trained(workers, jobsite, tmp_path, *words) == "gate_stop"
    assert trained(workers, jobsite, tmp_path, *words, "gates.action=roll_back") == "gate_stop"
    assert "no checkpoint is left that gates found healthy" in status(tmp_path)["reason"]


def test_a_run_that_a_gate_anneals_ends_early_at_rate_zero_and_goes_on_as_an_unbroken_one(workers, jobsite, tmp_path):
    words = [*HARMFUL, "gates.action=anneal", "gates.anneal_tokens=800", "gates.general_perplexity_limit=0.15"]
    assert trained(workers, jobsite, tmp_path / "a", *words) == "finished"
    (line,) = ledger(tmp_path / "a", "anneal")
    assert line["ends_at"] == line["tokens"] + 800 < 2500
    lines = metrics(tmp_path / "a", "train")
    assert lines[-1]["tokens"] >= line["ends_at"] > lines[-2]["tokens"] and lines[-1]["lr"] == 0
    asked = [0.3 * x["tokens"] / 2500 * min(1, max(0, (line["ends_at"] - x["tokens"]) / 800)) for x in lines]
    assert [x["lr"] for x in lines] == pytest.approx(asked)
    assert "annealed by a gate" in status(tmp_path / "a")["reason"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "b" / "checkpoints").glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > line["step"]:
            shutil.rmtree(folder)
    assert newest(tmp_path / "b").name == f"iter_{line['step']:07d}"
    assert trained(workers, jobsite, tmp_path / "b", *words) == "finished"
    same(tmp_path / "b", tmp_path / "a")
    assert [x["lr"] for x in metrics(tmp_path / "b", "train")] == [x["lr"] for x in lines]


@pytest.mark.full
def test_a_late_anneal_still_comes_to_rate_zero_and_says_so(workers, jobsite, tmp_path):
    words = [*HARMFUL, "gates.action=anneal", "gates.anneal_tokens=9000"]
    assert trained(workers, jobsite, tmp_path, *words) == "finished"
    (line,) = ledger(tmp_path, "anneal")
    assert line["ends_at"] == 2500 and metrics(tmp_path, "train")[-1]["lr"] == 0
    assert "annealed by a gate" in status(tmp_path)["reason"]


@pytest.mark.full
def test_each_rollback_raises_replay_further(workers, jobsite, tmp_path):
    places = {"domain": 0.98, "replay": 0.02}
    sources = [f"{{name: {n}, path: {jobsite.folder}/{n}, role: {n}, weight: {w}}}" for n, w in places.items()]
    words = [*HARMFUL, f"data.sources=[{', '.join(sources)}]", "gates.action=roll_back", "gates.lr_factor=1"]
    words += ["gates.replay_step=0.01", "gates.most_rollbacks=2", "gates.general_perplexity_limit=1"]
    assert trained(workers, jobsite, tmp_path, *words) == "gate_stop"
    backs = ledger(tmp_path, "rollback")
    assert [line["number"] for line in backs] == [1, 2]
    assert [line["raised_replay"] for line in backs] == pytest.approx([0.01, 0.02])
    mixtures = [line["state"]["in_effect"] for line in ledger(tmp_path, "data") if line["state"]["raised"]]
    assert [mixture[0][1]["replay"] for mixture in mixtures] == pytest.approx([0.03, 0.04])
    assert "no rollback: 2 were made" in status(tmp_path)["reason"] and not any(
        x.difference for x in take_again(tmp_path)
    )

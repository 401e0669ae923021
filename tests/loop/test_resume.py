"""Train through; or stop, resume, stop, resume: every loss, weight, moment, cursor and generator is the same, bit for bit."""

import json
import shutil

import pytest
import torch

from tests.helpers.jobsite import checkpoint_tensors, metrics, status
from tests.helpers.workers import JobFailed

LAYOUTS = {
    "one": (1, []),
    "one_dropout": (1, ["train.dropout=0.1"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "tp2_sp_dropout": (2, ["parallel.tp=2", "parallel.sp=true", "train.dropout=0.1", "train.deterministic=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "dp2_replicated_optimizer": (2, ["train.distributed_optimizer=false"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "one_bf16": (1, ["precision=bf16"]),
    "dp2_bf16": (2, ["precision=bf16"]),
    "pp2_bf16_dropout": (2, ["parallel.pp=2", "precision=bf16", "train.dropout=0.1"]),
    "dp2_bf16_replicated_optimizer": (2, ["precision=bf16", "train.distributed_optimizer=false"]),
    "tp2_sp_bf16": (2, ["parallel.tp=2", "parallel.sp=true", "precision=bf16"]),
}
FIELDS = ("step", "tokens", "loss", "grad_norm", "lr", "loss_by_source", "tokens_by_source")


def _run(workers, jobsite, run, world, overrides) -> str:
    """One launch of the same command; returns the state it ended in."""
    overrides = [f"run.dir={run}", *overrides]
    outcomes = workers(world).run("train", config=jobsite.config, overrides=overrides)
    assert len({state for state, _ in outcomes}) == 1
    return outcomes[0][0]


def _interrupted(workers, jobsite, run, world, overrides) -> None:
    """Two steps, each a process life of its own that STOP ends, and then the rest."""
    run.mkdir()
    for step in (1, 2):
        (run / "STOP").touch()
        assert _run(workers, jobsite, run, world, overrides) == "preempted"
        assert status(run)["exit_code"] == 75 and status(run)["step"] == step
        assert not (run / "STOP").exists()
    assert _run(workers, jobsite, run, world, overrides) == "finished"


# Under every megatron-core: saving and loading is where its versions differ most.
VERSIONS = ("one_bf16", "tp2_sp_dropout", "pp2_vpp2")
# What the quick ones, which have more switched on, have in them as well.
LONG = (
    "one", "one_dropout", "dp2", "tp2_sp", "tp2_sp_bf16", "pp2", "cp2", "dp2_bf16", "dp2_replicated_optimizer",
    "dp2_bf16_replicated_optimizer",
)  # fmt: skip


def _marks(layout: str) -> list:
    return [getattr(pytest.mark, word) for word, names in (("versions", VERSIONS), ("full", LONG)) if layout in names]


@pytest.mark.parametrize("layout", [pytest.param(name, marks=_marks(name)) for name in LAYOUTS])
def test_a_stopped_run_goes_on_bit_for_bit(workers, jobsite, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    assert _run(workers, jobsite, tmp_path / "through", world, overrides) == "finished"
    _interrupted(workers, jobsite, tmp_path / "stopped", world, overrides)
    through, stopped = (metrics(tmp_path / name, "train") for name in ("through", "stopped"))
    assert len(through) >= 4
    assert [[line[f] for f in FIELDS] for line in stopped] == [[line[f] for f in FIELDS] for line in through]
    looks = [
        [(x["step"], x["bucket"], x["value"]) for x in metrics(tmp_path / n, "eval")] for n in ("through", "stopped")
    ]
    assert looks[0] == looks[1] and len(looks[0]) == 4
    _same_checkpoint(*(_last(tmp_path / name) for name in ("through", "stopped")))


def _last(run):
    step = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    return run / "checkpoints" / f"iter_{step:07d}"


def _same_checkpoint(a, b) -> None:
    one, other = checkpoint_tensors(a), checkpoint_tensors(b)
    assert one.keys() == other.keys() and any(".exp_avg_sq." in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (a, b)]
    for field in ("step", "tokens", "stream", "baseline", "anomaly"):
        assert states[0][field] == states[1][field]
    assert states[0]["stream"]["sources"]["domain"]["rows_taken"] > 0 and states[0]["anomaly"]["losses"]


@pytest.mark.full
def test_state_saved_at_one_layout_goes_on_at_others(workers, jobsite, tmp_path):
    """Weights and moments are the same bits; the next losses agree to rounding."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "STOP").touch()
    assert _run(workers, jobsite, start, 2, ["parallel.tp=2", "parallel.sp=true"]) == "preempted"
    losses = {}
    for name, world, overrides in (
        ("same", 2, ["parallel.tp=2", "parallel.sp=true"]),
        ("one", 1, []),
        ("pp2", 2, ["parallel.pp=2"]),
        ("pp2_vpp2", 2, ["parallel.pp=2", "parallel.vpp=2"]),
        ("dp2", 2, []),
    ):
        words = [f"model.checkpoint={start}", "restore.mode=full", *overrides]
        assert _run(workers, jobsite, tmp_path / name, world, words) == "finished"
        lines = metrics(tmp_path / name, "train")
        assert lines[0]["step"] == 2
        losses[name] = [line["loss"] for line in lines]
    for name in ("one", "pp2", "pp2_vpp2", "dp2"):
        assert losses[name] == pytest.approx(losses["same"], rel=1e-4), name
        assert losses[name][0] == pytest.approx(losses["same"][0], rel=1e-6), name


def test_evaluation_changes_nothing_of_the_training(workers, jobsite, tmp_path):
    words = ["train.dropout=0.1"]
    _run(workers, jobsite, tmp_path / "often", 2, [*words, "eval.interval_tokens=200"])
    _run(workers, jobsite, tmp_path / "never", 2, [*words, "eval.sets=[]"])
    often, never = (metrics(tmp_path / name, "train") for name in ("often", "never"))
    assert len(metrics(tmp_path / "often", "eval")) > 4 and not metrics(tmp_path / "never", "eval")
    assert [[line[f] for f in FIELDS] for line in often] == [[line[f] for f in FIELDS] for line in never]


def test_a_finished_run_has_nothing_left_to_do(workers, jobsite, tmp_path):
    assert _run(workers, jobsite, tmp_path / "run", 1, []) == "finished"
    before = metrics(tmp_path / "run", "train")
    assert _run(workers, jobsite, tmp_path / "run", 1, []) == "finished"
    assert metrics(tmp_path / "run", "train") == before


def test_save_makes_a_checkpoint_and_goes_on(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "SAVE").touch()
    assert _run(workers, jobsite, run, 1, []) == "finished"
    assert not (run / "SAVE").exists()
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*"))[0] == "iter_0000001"


@pytest.mark.versions
@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=2e-3",
        pytest.param("optimizer.min_lr=1e-5", marks=pytest.mark.full),
        pytest.param("optimizer.weight_decay=0.2", marks=pytest.mark.full),
        "core.decoupled_lr=1e-3",
    ],
)
@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.full), "dp2_bf16"])
def test_an_accepted_change_of_rates_goes_on(workers, jobsite, tmp_path, change, layout):
    """Core knows its parameter groups by their rates: the stored ones must be found all the same."""
    world, overrides = LAYOUTS[layout]
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    assert _run(workers, jobsite, run, world, overrides) == "preempted"
    words = [*overrides, change, f"restore.accept=[{change.partition('=')[0]}]"]
    assert _run(workers, jobsite, run, world, words) == "finished"
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, status(run)["step"] + 1))


def test_a_reader_that_fails_loses_no_report(workers, jobsite, tmp_path):
    """The fault comes when a later batch is read ahead; the steps that were made are all reported, once."""
    run = tmp_path / "run"
    with pytest.raises(JobFailed) as failure:
        words = [f"run.dir={run}", "train.replica_check_steps=null"]
        workers(2).run("train_with_a_reader_that_fails", config=jobsite.config, overrides=words, rows=10)
    assert "the disk is gone" in str(failure.value)
    assert [line["step"] for line in metrics(run, "train")] == [1, 2]
    assert not list((run / "checkpoints").glob("iter_*"))


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_a_corpus_that_changes_under_a_run_is_a_fault_and_no_checkpoint(workers, jobsite, tmp_path, how):
    for suffix in (".bin", ".idx"):
        shutil.copyfile(jobsite.folder / f"domain{suffix}", tmp_path / f"domain{suffix}")
    run, prefix = tmp_path / "run", tmp_path / "domain"
    source = f"data.sources=[{{name: domain, path: {prefix}, role: domain}}]"
    words = [f"run.dir={run}", source, "checkpoint.interval_tokens=100"]
    with pytest.raises(JobFailed) as failure:
        job = {"config": jobsite.config, "overrides": words, "prefix": str(prefix), "rows": 12, "how": how}
        workers(1).run("train_while_a_corpus_changes", **job)
    assert failure.value.kind == "FaultError" and "domain.bin" in str(failure.value)
    saved = [int(path.name.removeprefix("iter_")) for path in (run / "checkpoints").glob("iter_*")]
    assert max(saved, default=0) < 4


def test_a_loss_that_is_not_finite_is_a_fault_that_saves_nothing(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(JobFailed) as failure:
        words = [f"run.dir={run}", "optimizer.lr=1e30", "schedule.warmup_tokens=0", "checkpoint.interval_tokens=1"]
        workers(1).run("train", config=jobsite.config, overrides=[*words, "anomaly.action=off"])
    assert failure.value.kind == "FaultError", str(failure.value)
    assert "nothing was saved after the last checkpoint" in str(failure.value)
    steps = [line["step"] for line in metrics(run, "train")]
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*")) == [f"iter_{n:07d}" for n in steps]

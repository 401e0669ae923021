"""Saves beside the training: what comes to disk is what the run had when the save began, or there is no checkpoint."""

import json

import pytest
import torch

from cpt_mega.hf.convert import export_hf
from cpt_mega.hf.weights import model_digest
from cpt_mega.lineage import damaged_files, is_complete, sealed_files
from tests.helpers.jobsite import checkpoint_tensors, metrics
from tests.helpers.workers import JobFailed

BACKGROUND, WAITING = "checkpoint.asynchronous=true", "checkpoint.asynchronous=false"
LAYOUTS = {
    "one": (1, []),
    "one_bf16": (1, ["precision=bf16"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "dp2_bf16": (2, ["precision=bf16"]),
    "dp2_replicated_optimizer": (2, ["train.distributed_optimizer=false"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_overwritten_at_once_are_on_disk_as_they_were(workers, jobsite, tmp_path, layout):
    """Core's staging copies nothing that is in the host's memory: without the fork the checkpoint would hold 777."""
    world, overrides = LAYOUTS[layout]
    words = [f"run.dir={tmp_path}", BACKGROUND, *overrides]
    folder = workers(world).run("save_and_overwrite", config=jobsite.config, overrides=words)[0]
    found, base = checkpoint_tensors(folder), checkpoint_tensors(jobsite.checkpoint)
    for name, tensor in base.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert not any((tensor == 777).any() for tensor in found.values())
    assert damaged_files(folder, sealed_files(folder)) == []


@pytest.mark.parametrize("mode", [BACKGROUND, WAITING])
def test_moved_storage_is_followed(workers, jobsite, tmp_path, mode):
    words = [f"run.dir={tmp_path}", mode]
    folders = workers(1).run("save_twice_with_moved_storage", config=jobsite.config, overrides=words)[0]
    before, after = map(checkpoint_tensors, folders)
    names = [name for name in before if not name.startswith("optimizer.")]
    for name in names:
        assert torch.equal(before[name] + 1, after[name]), name


@pytest.mark.parametrize(
    ("how", "mode", "said"),
    [
        ("stale", BACKGROUND, "is not on disk as the run had it"),
        ("stale", WAITING, "is not on disk as the run had it"),
        ("flipped", BACKGROUND, "is not on disk as the run had it"),
        ("failed", BACKGROUND, "OSError: the disk is gone, on rank 0"),
        ("failed", WAITING, "OSError: the disk is gone, on rank 0"),
        ("killed", BACKGROUND, "the process that wrote it was killed, on rank 0"),
        ("writer killed", BACKGROUND, "the process that wrote it was killed, on rank 0"),
    ],
)
def test_what_is_not_what_the_run_had_is_no_checkpoint(workers, jobsite, tmp_path, how, mode, said):
    words = [f"run.dir={tmp_path}", mode]
    with pytest.raises(JobFailed, match=said) as failure:
        workers(2).run("save_torn", config=jobsite.config, overrides=words, how=how)
    assert failure.value.kind == "FaultError" and "the one before it is intact" in str(failure.value)
    left = list((tmp_path / "checkpoints").iterdir())
    assert [path.name.startswith(".building-") for path in left] == [True] and not is_complete(left[0])


@pytest.mark.parametrize("what", ["index", "format"])
def test_what_the_main_process_alone_cannot_write_all_are_told(workers, jobsite, tmp_path, what):
    """Core leaves the others in a collective there, until its time is up."""
    words = [f"run.dir={tmp_path}", WAITING]
    said = workers(2).run("save_without_room_for_what_one_writes", config=jobsite.config, overrides=words, what=what)
    assert len(said) == 2 and all("No space left on device" in one and "is intact" in one for one in said)


def test_a_signal_to_all_processes_of_a_job_does_not_end_a_save(workers, jobsite, tmp_path):
    folder = workers(2).run("save_through_a_signal_to_all", config=jobsite.config, overrides=[f"run.dir={tmp_path}"])[0]
    assert is_complete(folder)


@pytest.mark.full
def test_a_save_whose_process_stands_still_is_begun_again_without_one(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path}", BACKGROUND, "checkpoint.interval_tokens=300"]
    outcomes = workers(2).run("train_with_a_writer_that_stands_still", config=jobsite.config, overrides=words)
    assert [state for state, _ in outcomes] == ["finished"] * 2
    saved = metrics(tmp_path, "checkpoint")
    assert len(saved) >= 3
    for line in saved:
        folder = tmp_path / "checkpoints" / f"iter_{line['step']:07d}"
        assert damaged_files(folder, sealed_files(folder)) == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_without_room_is_a_fault_before_anything_is_written(workers, jobsite, tmp_path, world):
    words = [f"run.dir={tmp_path / 'run'}", "train.tokens=200", "schedule.warmup_tokens=0"]
    with pytest.raises(JobFailed, match=r"a checkpoint needs 0.00 GiB and .* has 0.00 GiB free: make room") as failure:
        workers(world).run("train_on_a_full_disk", config=jobsite.config, overrides=words)
    assert failure.value.kind == "FaultError"
    assert not list((tmp_path / "run" / "checkpoints").glob("iter_*"))


@pytest.mark.parametrize("saves", [6, pytest.param(50, marks=pytest.mark.full)])
def test_memory_stays_flat_over_many_saves(workers, jobsite, tmp_path, saves):
    words = [f"run.dir={tmp_path}", BACKGROUND]
    sizes = workers(1).run("memory_of_saves", timeout_s=300, config=jobsite.config, overrides=words, saves=saves)[0]
    assert sizes[-1] - sizes[2] < 8 * 2**20, sizes


def test_a_model_has_one_name_at_every_layout_as_an_import_and_as_an_export(workers, jobsite, tmp_path):
    name = model_digest(jobsite.hf)
    assert model_digest(jobsite.checkpoint) == name
    more = {"pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]), "cp2": (2, ["parallel.cp=2"])}
    for layout, (world, overrides) in (LAYOUTS | more).items():
        if "bf16" not in layout:
            words = [f"run.dir={tmp_path}", *overrides]
            assert set(workers(world).run("name_of_weights", config=jobsite.config, overrides=words)) == {name}, layout


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2_bf16"])
def test_a_runs_checkpoint_says_the_name_of_its_export_and_of_its_parent(workers, jobsite, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    words = [f"run.dir={tmp_path / 'run'}", "train.tokens=200", "schedule.warmup_tokens=0", *overrides]
    workers(world).run("train", config=jobsite.config, overrides=words)
    folder = tmp_path / "run" / "checkpoints" / "iter_0000001"
    lineage = json.loads((folder / "trainer_state.json").read_text())["lineage"]
    export_hf(folder, tmp_path / "export")
    assert lineage["weights"] == model_digest(folder) == model_digest(tmp_path / "export")
    assert lineage["weights"] != lineage["parent_weights"]
    if "bf16" not in layout:  # the base is fp32, and its bf16 values are another model
        assert lineage["parent_weights"] == model_digest(jobsite.hf)


def test_training_goes_on_while_a_checkpoint_is_written(workers, jobsite, tmp_path):
    """The same checkpoints, losses and tensors, waited for or not."""
    for name, mode in (("waiting", WAITING), ("background", BACKGROUND)):
        words = [f"run.dir={tmp_path / name}", mode, "checkpoint.interval_tokens=300"]
        workers(2).run("train", config=jobsite.config, overrides=words)
    losses = [[line["loss"] for line in metrics(tmp_path / name, "train")] for name in ("waiting", "background")]
    assert losses[0] == losses[1]
    folders = [sorted((tmp_path / name / "checkpoints").glob("iter_*")) for name in ("waiting", "background")]
    assert [f.name for f in folders[0]] == [f.name for f in folders[1]] and len(folders[0]) > 2
    for one, other in zip(*folders, strict=True):
        tensors = checkpoint_tensors(one), checkpoint_tensors(other)
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    told = metrics(tmp_path / "background", "checkpoint")
    lines = [(line["kind"], line["step"]) for line in metrics(tmp_path / "background")]
    for line in told[:-1]:  # the run is over before the last
        assert lines.index(("train", line["step"] + 1)) < lines.index(("checkpoint", line["step"]))
    assert [line["step"] for line in told] == [int(f.name.removeprefix("iter_")) for f in folders[1]]
    assert all(0 < line["held_s"] <= line["seconds"] and line["bytes"] > 0 for line in told)
    for name in ("waiting", "background"):
        assert not list((tmp_path / name / "checkpoints").glob(".building*"))


def test_what_a_killed_run_left_unfinished_is_removed_at_the_next_start(workers, jobsite, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".building-iter_0000009-abc"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_text("half")
    words = [f"run.dir={tmp_path / 'run'}", "train.tokens=200", "schedule.warmup_tokens=0"]
    workers(1).run("train", config=jobsite.config, overrides=words)
    assert not left.exists()

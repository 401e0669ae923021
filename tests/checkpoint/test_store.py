"""Checkpoint folders: complete and verifiable, or passed over."""

import json
import shutil

import pytest

from cpt_mega.lineage import damaged_files, is_complete, sealed_files
from tests.helpers.jobsite import metrics, status
from tests.helpers.workers import JobFailed


@pytest.fixture(scope="module")
def finished(workers, jobsite, tmp_path_factory):
    run = tmp_path_factory.mktemp("store") / "run"
    overrides = [f"run.dir={run}", "checkpoint.interval_tokens=200"]
    workers(1).run("train", config=jobsite.config, overrides=overrides)
    return run


@pytest.fixture
def run(finished):
    """A finished run with a checkpoint at each of its steps, at its place, to be spoilt."""
    kept = finished.with_name("kept")
    if not kept.exists():
        shutil.copytree(finished, kept)
    shutil.rmtree(finished)
    shutil.copytree(kept, finished)
    return finished


def _again(workers, jobsite, run, *overrides):
    words = [f"run.dir={run}", "checkpoint.interval_tokens=200", *overrides]
    return workers(1).run("train", config=jobsite.config, overrides=words)[0]


def _folders(run):
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def test_every_file_is_sealed_and_nothing_else_is_left(run):
    folders = _folders(run)
    assert [f.name for f in folders] == [f"iter_{step:07d}" for step in range(1, len(folders) + 1)]
    for folder in folders:
        assert is_complete(folder)
        files = sealed_files(folder)
        assert {
            "model.json",
            "hf/config.json",
            "trainer_state.json",
            "fingerprints.json",
            ".metadata",
            "metadata.json",
        } <= files.keys()
        assert damaged_files(folder, files) == []
    tracker = (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert tracker.strip() == str(len(folders))
    lineage = json.loads((folders[-1] / "trainer_state.json").read_text())["lineage"]
    digests = {"base_digest", "tokenizer_digest", "corpora", "eval", "suite"}
    assert (
        digests | {"packing_version", "code", "libraries", "restore", "began", "weights", "parent_weights"}
        == lineage.keys()
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unseal"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(workers, jobsite, run, damage):
    newest = _folders(run)[-1]
    before = metrics(run, "train")
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-10])
    elif damage == "remove":
        shard.unlink()
    else:
        (newest / "COMPLETE").unlink()
    assert _again(workers, jobsite, run)[0] == "finished"
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    restored = [line for line in ledger if line["kind"] == "restore"][-1]
    assert restored["from"] == str(_folders(run)[-2])
    assert metrics(run, "train")[-1]["loss"] == before[-1]["loss"]
    assert damaged_files(newest, sealed_files(newest)) == []


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(workers, jobsite, run):
    for folder in _folders(run):
        (folder / "COMPLETE").unlink()
    with pytest.raises(JobFailed, match="no checkpoint of this run can be used") as refusal:
        _again(workers, jobsite, run)
    assert refusal.value.kind == "CheckpointError"
    assert status(run)["state"] == "finished"  # nothing was touched

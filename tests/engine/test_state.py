"""Checkpoints of unknown origin, as the engine loads them: through either megatron-core, and on every process."""

import shutil

import pytest
import torch

from tests.helpers.hostile import COMMON, INDEX, OBJECT, PARTS, TENSOR, hostile_copy, payloads
from tests.helpers.workers import JobFailed


@pytest.mark.versions
@pytest.mark.parametrize("part", [INDEX, COMMON, OBJECT])
def test_every_process_refuses_a_checkpoint_that_would_run_code(workers, jobsite, tmp_path, part):
    """Also where one process alone looks at the file: the others would wait for it."""
    canary = tmp_path / "canary"
    folder = hostile_copy(jobsite.checkpoint, tmp_path / "hostile", part, payloads(canary)["posix.system"])
    with pytest.raises(JobFailed, match=PARTS[part]) as refusal:
        workers(2).run("load_folder", config=jobsite.config, folder=str(folder))
    assert refusal.value.kind == "CheckpointError"
    assert not canary.exists()


@pytest.mark.versions
def test_a_state_that_a_module_would_unpickle_is_refused(workers, jobsite, tmp_path):
    """Core merges common.pt into what it loads; torch's restricted unpickler finds nothing wrong with bytes."""
    folder = tmp_path / "hostile"
    shutil.copytree(jobsite.checkpoint, folder)
    name = "decoder.final_layernorm._extra_state"
    torch.save({"model": {name: torch.zeros(3, dtype=torch.uint8)}}, folder / "common.pt")
    with pytest.raises(JobFailed, match=f"{name}.*do not load it") as refusal:
        workers(1).run("load_folder", config=jobsite.config, folder=str(folder))
    assert refusal.value.kind == "CheckpointError"


@pytest.mark.versions
def test_what_lies_in_a_tensors_place_runs_nothing(workers, jobsite, tmp_path):
    canary = tmp_path / "canary"
    folder = hostile_copy(jobsite.checkpoint, tmp_path / "hostile", TENSOR, payloads(canary)["posix.system"])
    with pytest.raises(JobFailed, match=f"{folder}.*cannot be loaded") as refusal:
        workers(1).run("load_folder", config=jobsite.config, folder=str(folder))
    assert refusal.value.kind == "CheckpointError"
    assert not canary.exists()

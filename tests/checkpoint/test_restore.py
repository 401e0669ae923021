"""What a restore takes over, what it starts afresh, and what it refuses by name."""

import fcntl
import json
import shutil

import numpy as np
import pytest
import torch

from cpt_mega.data.packing import PACKING_VERSION
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.lineage import COMPLETE, MANIFEST, file_digest, seal_folder
from tests.helpers.jobsite import checkpoint_tensors, metrics, random_documents, write_documents
from tests.helpers.workers import JobFailed


@pytest.fixture(scope="module")
def stopped(workers, jobsite, tmp_path_factory):
    """A run that was stopped after its first step."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    run.mkdir()
    (run / "STOP").touch()
    _train(workers, jobsite, run)
    return run


def _train(workers, jobsite, run, *overrides):
    return workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={run}", *overrides])[0]


def _refused(workers, jobsite, run, *overrides) -> str:
    with pytest.raises(JobFailed) as refusal:
        _train(workers, jobsite, run, *overrides)
    assert refusal.value.kind in ("InputError", "CheckpointError")
    return str(refusal.value).splitlines()[0]


def test_weights_start_a_new_run_on_old_weights(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=weights"]
    assert _train(workers, jobsite, tmp_path / "new", *words)[0] == "finished"
    first = metrics(tmp_path / "new", "train")[0]
    assert first["step"] == 1 and first["lr"] == metrics(stopped, "train")[0]["lr"]
    states = [
        json.loads((next((run / "checkpoints").glob("iter_*")) / "trainer_state.json").read_text())
        for run in (stopped, tmp_path / "new")
    ]
    assert states[0]["run_id"] != states[1]["run_id"]
    assert states[1]["parent"] == str(stopped / "checkpoints" / "iter_0000001")
    baseline = metrics(tmp_path / "new", "eval")[0]["value"]
    assert baseline != metrics(stopped, "eval")[0]["value"]  # taken on the restored model


@pytest.mark.parametrize("world", [1, 2])
def test_moments_come_along_into_a_new_run_with_their_step_count(workers, jobsite, stopped, tmp_path, world):
    """A step on restored moments has the moments of a step on fresh ones, and the restored ones as far as Adam keeps them."""
    folders = {}
    for mode in ("weights", "weights+moments"):
        run = tmp_path / mode
        run.mkdir()
        (run / "STOP").touch()
        words = [f"run.dir={run}", f"model.checkpoint={stopped}", f"restore.mode={mode}"]
        workers(world).run("train", config=jobsite.config, overrides=words)
        folders[mode] = run / "checkpoints" / "iter_0000001"
    fresh, warm = (checkpoint_tensors(folder) for folder in folders.values())
    old = checkpoint_tensors(stopped / "checkpoints" / "iter_0000001")
    for moment, decay in ((".exp_avg.", 0.9), (".exp_avg_sq.", 0.95)):
        names = [name for name in old if moment in name]
        assert names
        for name in names:
            expected = fresh[name] + decay * old[name]
            assert (warm[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12, name
    assert [group["step"] for group in _groups(folders["weights+moments"])] == [2, 2]
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders.values()]
    assert states[1]["step"] == 1 and states[1]["tokens"] == states[0]["tokens"]  # the schedule and the data begin anew
    assert states[1]["lineage"]["restore"] == "weights+moments"


def _groups(folder):
    """The optimizer's parameter groups in a checkpoint."""
    return torch.load(folder / "common.pt", weights_only=False)["optimizer"]["optimizer"]["param_groups"]


def test_moments_are_refused_where_there_are_none_or_the_run_has_begun(workers, jobsite, stopped, tmp_path):
    assert "holds weights only" in _refused(workers, jobsite, tmp_path / "run", "restore.mode=weights+moments")
    assert "restore.mode=auto" in _refused(workers, jobsite, stopped, "restore.mode=weights+moments")
    words = [f"model.checkpoint={stopped}", "restore.mode=weights+moments", "train.distributed_optimizer=false"]
    assert "train.distributed_optimizer" in _refused(workers, jobsite, tmp_path / "run", *words)


@pytest.mark.parametrize("mode", ["full", "weights+moments"])
def test_settings_of_adam_are_those_of_the_configuration(workers, jobsite, stopped, tmp_path, mode):
    changes = {"optimizer.beta1": 0.5, "optimizer.eps": 1e-4, "optimizer.weight_decay": 0.25}
    words = [f"model.checkpoint={stopped}", f"restore.mode={mode}", f"restore.accept=[{', '.join(changes)}]"]
    _train(workers, jobsite, tmp_path / "run", *words, *(f"{name}={value}" for name, value in changes.items()))
    newest = max((tmp_path / "run" / "checkpoints").glob("iter_*"))
    found = [(group["betas"], group["eps"], group["weight_decay"]) for group in _groups(newest)]
    assert found == [((0.5, 0.95), 1e-4, 0.25), ((0.5, 0.95), 1e-4, 0.0)]


def test_a_step_at_rate_zero_changes_no_weight(workers, jobsite, tmp_path):
    """A stale fp32 master copy would show here: after a weights-only restore it must follow the weights."""
    for precision in ("fp32", "bf16"):
        words = [
            f"precision={precision}",
            "optimizer.lr=1e-30",
            "optimizer.weight_decay=0",
            "train.tokens=200",
            "schedule.warmup_tokens=0",
        ]
        _train(workers, jobsite, tmp_path / precision, *words)
        before = checkpoint_tensors(jobsite.checkpoint)
        after = checkpoint_tensors(tmp_path / precision / "checkpoints" / "iter_0000001")
        for name, tensor in before.items():
            assert np.array_equal(tensor.to(after[name].dtype).float().numpy(), after[name].float().numpy()), name


def test_weights_do_not_go_into_a_run_that_has_checkpoints(workers, jobsite, stopped):
    assert "restore.mode=auto" in _refused(workers, jobsite, stopped, "restore.mode=weights")


def test_full_needs_optimizer_state(workers, jobsite, tmp_path):
    assert "weights only" in _refused(workers, jobsite, tmp_path / "run", "restore.mode=full")


@pytest.mark.parametrize(
    "change",
    ["optimizer.lr=2e-2", "train.tokens=2000", "train.seed=7", "schedule.kind=constant", "data.packing=concat"],
)
def test_another_experiment_is_refused_unless_accepted(workers, jobsite, stopped, tmp_path, change):
    field = change.partition("=")[0]
    words = [f"model.checkpoint={stopped}", "restore.mode=full", change]
    refusal = _refused(workers, jobsite, tmp_path / "run", *words)
    assert refusal.startswith(f"train: {field} = ") and f"restore.accept=[{field}]" in refusal
    assert _train(workers, jobsite, tmp_path / "run", *words, f"restore.accept=[{field}]")[0] == "finished"
    assert metrics(tmp_path / "run", "train")[0]["step"] == 2


def test_the_other_optimizer_cannot_go_on(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=full", "train.distributed_optimizer=false"]
    assert "train.distributed_optimizer" in _refused(workers, jobsite, tmp_path / "run", *words)


def test_harmless_differences_are_listed_and_taken(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=full", "logging.interval_steps=2", "train.micro_batch_size=1"]
    assert _train(workers, jobsite, tmp_path / "run", *words)[0] == "finished"
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    rows = {item: what for item, what, _ in ledger[0]["rows"]}
    assert rows["logging.interval_steps"] == rows["train.micro_batch_size"] == "harmless"
    assert rows["optimizer moments"] == rows["data cursors"] == rows["generators"] == "restored"


def test_rows_that_were_packed_by_other_code_are_refused_unless_accepted(workers, jobsite, stopped, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(next((stopped / "checkpoints").glob("iter_*")), folder)
    words = [f"model.checkpoint={folder}", "restore.mode=full"]

    def written_by(version):
        state = json.loads((folder / "trainer_state.json").read_text())
        state["lineage"] |= {"packing_version": version}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for name in (COMPLETE, MANIFEST):
            (folder / name).unlink()
        seal_folder(folder)

    written_by(None)
    accepting = [*words, "restore.accept=[data.packing]"]
    assert "of older code" in (refusal := _refused(workers, jobsite, tmp_path / "run", *accepting))
    assert "restore.mode=weights" in refusal
    written_by(0)
    assert f"data.packing = 'version {PACKING_VERSION}'" in _refused(workers, jobsite, tmp_path / "run", *words)
    assert _train(workers, jobsite, tmp_path / "run", *accepting)[0] == "finished"


def test_another_corpus_under_the_same_name_is_refused(workers, jobsite, stopped, tmp_path):
    write_documents(tmp_path / "domain", random_documents(9, 60, jobsite.vocab_size, upper=True))
    sources = (
        f"data.sources=[{{name: domain, path: {tmp_path}/domain, role: domain}},"
        f" {{name: replay, path: {jobsite.folder}/replay, role: replay}}]"
    )
    words = [f"model.checkpoint={stopped}", "restore.mode=full", sources]
    assert "corpus is not the one" in _refused(workers, jobsite, tmp_path / "run", *words)
    accepted = [*words, "restore.accept=[data.sources]"]
    assert _train(workers, jobsite, tmp_path / "run", *accepted)[0] == "finished"


def test_a_checkpoint_of_another_shape_is_refused_by_tensor(workers, jobsite, tmp_path):
    """model.json that promises another model than the tensors hold, sealed all the same."""
    lying = tmp_path / "lying"
    shutil.copytree(jobsite.checkpoint, lying)
    model = json.loads((lying / "model.json").read_text())
    for change, tensor in (
        ({"vocab_size": 500}, "embedding.word_embeddings.weight"),
        ({"layers": 6}, "decoder.layers"),
    ):
        (lying / "COMPLETE").unlink()
        (lying / "model.json").write_text(json.dumps({**model, "shape": {**model["shape"], **change}}))
        seal_folder(lying)
        refusal = _refused(workers, jobsite, tmp_path / "run", f"model.checkpoint={lying}")
        assert tensor in refusal and "shape" in refusal


def test_missing_and_damaged_starts_are_refused(workers, jobsite, tmp_path):
    assert "no such folder" in _refused(workers, jobsite, tmp_path / "run", f"model.checkpoint={tmp_path}/none")
    assert "import it first" in _refused(workers, jobsite, tmp_path / "run", f"model.checkpoint={jobsite.hf}")


def test_a_run_goes_on_as_the_model_it_was(workers, jobsite, tmp_path):
    """model.checkpoint is where a run started; naming another model there changes nothing of a run that has begun."""
    other = tmp_path / "other"
    shutil.copytree(jobsite.hf, other / "hf")
    config = json.loads((other / "hf" / "config.json").read_text())
    (other / "hf" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    import_hf(other / "hf", other / "import")
    losses = []
    for name, words in (("run_same", []), ("run_other", [f"model.checkpoint={other}/import"])):
        run = tmp_path / name
        run.mkdir()
        (run / "STOP").touch()
        _train(workers, jobsite, run)
        assert _train(workers, jobsite, run, *words)[0] == "finished"
        losses.append([line["loss"] for line in metrics(run, "train")])
    assert losses[0] == losses[1]


def test_the_export_of_an_extended_run_is_the_extended_model(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    words = ["checkpoint.export_hf=final", "schedule.kind=constant"]
    _train(workers, jobsite, run, *words)
    first = file_digest(run / "export" / "model.safetensors")
    _train(workers, jobsite, run, *words, "train.tokens=2000", "restore.accept=[train.tokens]")
    assert file_digest(run / "export" / "model.safetensors") != first
    export_hf(run, tmp_path / "again")
    assert file_digest(run / "export" / "model.safetensors") == file_digest(tmp_path / "again" / "model.safetensors")
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]


def test_moving_a_corpus_is_no_change(workers, jobsite, stopped, tmp_path):
    for name in ("domain", "replay"):
        for end in ("bin", "idx"):
            shutil.copy(jobsite.folder / f"{name}.{end}", tmp_path)
    sources = ", ".join(f"{{name: {name}, path: {tmp_path}/{name}, role: {name}}}" for name in ("domain", "replay"))
    words = [f"model.checkpoint={stopped}", "restore.mode=full", f"data.sources=[{sources}]"]
    assert _train(workers, jobsite, tmp_path / "run", *words)[0] == "finished"


def test_two_runs_in_one_folder_are_refused(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as lock:
        lock.write("pid 1 on there\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing here (pid 1 on there)" in _refused(workers, jobsite, run)
    assert _train(workers, jobsite, run)[0] == "finished"


def test_an_option_that_did_not_exist_then_has_its_default(workers, jobsite, stopped, tmp_path):
    """A checkpoint from before an option goes on; one whose value now differs from that default is asked about."""
    shutil.copytree(stopped, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "iter_0000001"
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["config"]["core"], state["config"]["profile"], state["config"]["train"]["gc_interval_steps"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    seal_folder(folder)
    said = _refused(workers, jobsite, tmp_path / "run", "core.decoupled_lr=1e-3")
    assert "core.decoupled_lr = 0.001" in said and "restore.accept=[core.decoupled_lr]" in said
    assert _train(workers, jobsite, tmp_path / "run")[0] == "finished"

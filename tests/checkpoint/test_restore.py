"""What a restore takes over, what it starts afresh, and what it refuses by name."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from cpt_mega.checkpoint.restore import Start, plan_restore
from cpt_mega.checkpoint.trainer_state import FORMAT, STATE_FILE
from cpt_mega.config.load import load_config
from cpt_mega.data.packing import PACKING_VERSION
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.lineage import COMPLETE, MANIFEST, file_digest, seal_folder
from cpt_mega.loop.lease import Lease
from tests.helpers.hostile import COMMON, INDEX, OBJECT, PARTS, hostile_copy, payloads
from tests.helpers.jobsite import checkpoint_tensors, metrics, random_documents, write_documents
from tests.helpers.models import tiny_llama
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


# What a contract has a line for, whatever the mode.
ITEMS = [
    "weights",
    "master weights",
    "optimizer moments",
    "run id",
    "step",
    "tokens",
    "learning-rate schedule",
    "data cursors",
    "generators",
    "gate history",
    "anomaly window",
    "FP8 scales",
]


LAYOUTS_AT_RATE_ZERO = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
}


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


def _at_rate_zero():
    """Each optimizer, precision and sharding; the quick ones have every value of each in them."""
    quick = ("one-fp32-replicated", "one-bf16-distributed", "dp2-bf16-replicated")
    quick += ("tp2_sp-bf16-distributed", "pp2-fp32-distributed")
    for case in itertools.product(LAYOUTS_AT_RATE_ZERO, ("fp32", "bf16"), ("distributed", "replicated")):
        name = "-".join(case)
        yield pytest.param(*case, id=name, marks=() if name in quick else pytest.mark.full)


@pytest.mark.parametrize(("layout", "precision", "optimizer"), list(_at_rate_zero()))
def test_a_step_at_rate_zero_changes_no_weight(workers, jobsite, stopped, tmp_path, layout, precision, optimizer):
    """A stale fp32 master copy would show here: after a weights-only restore it must follow the weights."""
    world, overrides = LAYOUTS_AT_RATE_ZERO[layout]
    words = [
        *overrides,
        f"run.dir={tmp_path / 'run'}",
        f"model.checkpoint={stopped}",
        "restore.mode=weights",
        f"precision={precision}",
        f"train.distributed_optimizer={str(optimizer == 'distributed').lower()}",
        "optimizer.lr=0",
        "train.tokens=200",
        "schedule.warmup_tokens=0",
    ]
    workers(world).run("train", config=jobsite.config, overrides=words)
    before = checkpoint_tensors(stopped / "checkpoints" / "iter_0000001")
    after = checkpoint_tensors(tmp_path / "run" / "checkpoints" / "iter_0000001")
    names = [name for name in before if not name.startswith("optimizer.")]
    assert names and any(".exp_avg." in name and tensor.any() for name, tensor in after.items())  # a step was made
    for name in names:
        assert torch.equal(before[name].to(after[name].dtype), after[name]), name
        master = after.get(f"optimizer.state.param.{name}")
        assert master is None or torch.equal(master.to(after[name].dtype), after[name]), name


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
    assert refusal.startswith(f"train: {field} = ") and f"--accept {field}" in refusal
    assert _train(workers, jobsite, tmp_path / "run", *words, f"restore.accept=[{field}]")[0] == "finished"
    assert metrics(tmp_path / "run", "train")[0]["step"] == 2


def test_what_was_accepted_once_is_no_licence_for_the_next_start(workers, jobsite, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    _train(workers, jobsite, tmp_path / "run", "train.tokens=500", "restore.accept=[train.tokens]")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["restore"]["accept"] == [] and config["train"]["tokens"] == 500
    assert "--accept train.tokens" in _refused(workers, jobsite, tmp_path / "run", "train.tokens=900")


def test_a_run_that_goes_on_in_another_folder_is_another_run(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=full"]
    _train(workers, jobsite, tmp_path / "fork", *words)
    shutil.copytree(stopped, tmp_path / "same")
    _train(workers, jobsite, tmp_path / "same")
    first = stopped / "checkpoints" / "iter_0000001"
    was = json.loads((first / "trainer_state.json").read_text())
    newest = [max((tmp_path / name / "checkpoints").glob("iter_*")) for name in ("fork", "same")]
    fork, same = (json.loads((folder / "trainer_state.json").read_text()) for folder in newest)
    assert fork["run_id"] != was["run_id"] and fork["parent"] == str(first)
    assert fork["lineage"]["parent_weights"] == was["lineage"]["weights"] and fork["lineage"]["began"] == "full"
    assert same["run_id"] == was["run_id"] and same["parent"] == was["parent"]
    assert same["lineage"]["began"] == "weights" and same["lineage"]["restore"] == "full"


def test_an_older_checkpoint_of_the_very_run_is_not_named_in_vain(workers, jobsite, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    _train(workers, jobsite, tmp_path / "run")
    older = f"model.checkpoint={tmp_path}/run/checkpoints/iter_0000001"
    assert "goes on from its newest checkpoint" in _refused(
        workers, jobsite, tmp_path / "run", older, "restore.mode=full"
    )


def test_everything_that_is_refused_is_shown_before_the_first_of_it_ends_the_start(jobsite, stopped):
    words = ["optimizer.lr=2e-2", "train.seed=7", "train.distributed_optimizer=false", "logging.interval_steps=9"]
    command = [
        sys.executable,
        "-m",
        "cpt_mega.train",
        "--config",
        jobsite.config,
        "--dry-run",
        f"run.dir={stopped}",
        *words,
    ]
    done = subprocess.run([*command, "--accept", "train.seed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "(1 more in the table above; what can be accepted: --accept optimizer.lr)" in done.stderr
    found = dict(
        line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("optimizer.", "train.", "logging."))
    )
    assert found == {
        "optimizer.lr": "refused",
        "train.seed": "accepted",
        "train.distributed_optimizer": "refused",
        "logging.interval_steps": "harmless",
    }


def test_the_other_optimizer_cannot_go_on(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=full", "train.distributed_optimizer=false"]
    assert "train.distributed_optimizer" in _refused(workers, jobsite, tmp_path / "run", *words)


def test_harmless_differences_are_listed_and_taken(workers, jobsite, stopped, tmp_path):
    words = [f"model.checkpoint={stopped}", "restore.mode=full", "logging.interval_steps=2", "train.micro_batch_size=1"]
    assert _train(workers, jobsite, tmp_path / "run", *words)[0] == "finished"
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    rows = {item: what for item, what, _ in ledger[0]["rows"]}
    assert [item for item, *_ in ledger[0]["rows"]][: len(ITEMS)] == ITEMS
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


@pytest.mark.parametrize(
    ("change", "kept"),
    [({}, True), ({"suite": {"letters": "b"}}, False), ({"suite": {}}, False), ({"eval": {"general": "b"}}, False)],
    ids=["same", "other items", "fewer probes", "other sets"],
)
def test_patience_does_not_count_looks_at_other_items(jobsite, tmp_path, change, kept):
    config = load_config(jobsite.config, [f"run.dir={tmp_path}"])
    lineage = {"tokenizer_digest": "t", "packing_version": 1, "corpora": {}}
    lineage |= {"eval": {"general": "a"}, "suite": {"letters": "a"}}
    look = {"step": 1, "tokens": 9, "perplexity": {"domain": 2.0}, "action": "warn", "objections": {"general": "hard"}}
    values = {"run_id": "r", "step": 1, "lineage": lineage, "gate_history": [look], "item_noise": {"d": 0.5}}
    values |= {"format": FORMAT, "parent": "", "config": config.model_dump(mode="json")}
    folder = tmp_path / "checkpoints" / "iter_0000001"
    shutil.copytree(jobsite.checkpoint, folder)
    (folder / STATE_FILE).write_text(json.dumps(values))
    (found,) = plan_restore(config, Start("full", folder, []), lineage | change, {"tp": 1}).state.gate_history
    assert found == (look if kept else {name: value for name, value in look.items() if name != "objections"})


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


def test_a_run_goes_on_as_the_model_it_was(workers, jobsite, stopped, tmp_path):
    """model.checkpoint is where a run started: once it has begun it may be gone, but not be another model."""
    other = tmp_path / "other"
    shutil.copytree(jobsite.hf, other / "hf")
    config = json.loads((other / "hf" / "config.json").read_text())
    config |= {
        "rms_norm_eps": 0.1,
        "rope_parameters": {**config["rope_parameters"], "rope_theta": 5e5},
        "rope_theta": 5e5,
    }
    (other / "hf" / "config.json").write_text(json.dumps(config))
    import_hf(other / "hf", other / "import")
    shutil.copytree(stopped, tmp_path / "run")
    refusal = _refused(workers, jobsite, tmp_path / "run", f"model.checkpoint={other}/import")
    assert refusal.startswith("train: model norm_eps = 0.1") and "more in the table above" in refusal
    same_shape = tmp_path / "base"
    tiny_llama(same_shape / "hf", num_hidden_layers=4, vocab_size=jobsite.vocab_size, initializer_range=0.02, seed=1)
    import_hf(same_shape / "hf", same_shape / "import")
    words = ["--accept model.checkpoint", "another base"]
    refusal = _refused(workers, jobsite, tmp_path / "run", f"model.checkpoint={same_shape}/import")
    assert all(word in refusal for word in words)
    assert _train(workers, jobsite, tmp_path / "run", f"model.checkpoint={tmp_path}/gone")[0] == "finished"


def test_the_export_of_an_extended_run_is_the_extended_model(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    words = ["checkpoint.export_hf=final", "schedule.kind=constant"]
    _train(workers, jobsite, run, *words)
    first = file_digest(run / "export" / "model.safetensors")
    _train(workers, jobsite, run, *words, "train.tokens=2000", "restore.accept=[train.tokens]")
    assert file_digest(run / "export" / "model.safetensors") != first
    export_hf(run, tmp_path / "again")
    assert file_digest(run / "export" / "model.safetensors") == file_digest(tmp_path / "again" / "model.safetensors")
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


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
    lease = Lease.take(run)
    assert f"another run is writing here (pid {os.getpid()} on {socket.gethostname()})" in _refused(
        workers, jobsite, run
    )
    lease.release()
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
    assert "core.decoupled_lr = 0.001" in said and "--accept core.decoupled_lr" in said
    assert _train(workers, jobsite, tmp_path / "run")[0] == "finished"


@pytest.mark.parametrize("part", [INDEX, COMMON, OBJECT])
@pytest.mark.parametrize("mode", ["weights", "full"])
def test_a_checkpoint_runs_nothing(workers, jobsite, stopped, tmp_path, mode, part):
    start, canary = next((stopped / "checkpoints").glob("iter_*")), tmp_path / "canary"
    folder = hostile_copy(start, tmp_path / "hostile", part, payloads(canary)["posix.system"])
    words = [f"model.checkpoint={folder}", f"restore.mode={mode}"]
    refusal = _refused(workers, jobsite, tmp_path / "run", *words)
    assert str(folder / PARTS[part]) in refusal and "wants to load posix.system" in refusal
    assert not canary.exists()  # tests/hf/test_untrusted.py shows that each would be made by torch alone

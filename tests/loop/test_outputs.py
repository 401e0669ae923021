"""What a run leaves: metrics, reporters under the field's names, and the plan of a dry run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cpt_mega.loop.lease import Lease
from cpt_mega.loop.reporters import TensorBoard
from tests.helpers.jobsite import metrics, status

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def run(workers, jobsite, tmp_path_factory):
    run = tmp_path_factory.mktemp("outputs") / "run"
    words = [f"run.dir={run}", "logging.tensorboard=true", "logging.wandb=offline", "logging.interval_steps=2"]
    workers(2).run("train", config=jobsite.config, overrides=[*words, "checkpoint.export_hf=none"])
    return run


def test_metrics_have_a_line_a_step_and_a_line_a_reading(run):
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0].keys() == {
        "kind", "step", "tokens", "tokens_trained", "refused", "loss", "grad_norm", "lr", "tokens_per_s_device", "data_wait_s",
        "loss_by_source", "tokens_by_source", "epochs_by_source", "forward_backward_s", "optimizer_s",
    }  # fmt: skip
    last = lines[-1]
    assert last["tokens_trained"] == last["tokens"] and not any(line["refused"] for line in lines)
    assert sum(last["tokens_by_source"].values()) == last["tokens"] >= 1000
    assert last["tokens_by_source"]["replay"] / last["tokens"] == pytest.approx(0.2, abs=32 / last["tokens"] + 1e-9)
    looks = metrics(run, "eval")
    assert {line["bucket"] for line in looks} == {"domain", "general"}
    assert looks[0].keys() == {"kind", "step", "tokens", "bucket", "probe", "metric", "value", "n"}


def test_the_loss_is_the_sources_losses_together(run):
    for line in metrics(run, "train"):
        values = line["loss_by_source"].values()
        assert min(values) - 1e-9 <= line["loss"] <= max(values) + 1e-9


def test_the_folder_says_what_ran(run, jobsite):
    ended = status(run)
    assert ended.keys() == {"state", "exit_code", "reason", "step", "tokens", "run_id", "next_command"}
    assert (ended["state"], ended["exit_code"]) == ("finished", 0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"]["dir"] == str(run) and config["train"]["seed"] == 1234
    ranks = json.loads((run / "ranks.json").read_text())
    assert [entry["rank"] for entry in ranks] == [0, 1] and all(entry["pid"] for entry in ranks)


def test_tensorboard_has_megatrons_names(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"lm loss", "learning-rate", "grad-norm", "batch-size", "throughput/device/tokens_per_sec"} <= names
    assert {"consumed-tokens", "lm loss validation", "lm loss validation/general"} <= names
    assert [e.step for e in events.Scalars("lm loss")] == [2, 4, 5]  # every interval, and the last step
    by_step = {line["step"]: line["loss"] for line in metrics(run, "train")}
    for event in events.Scalars("lm loss"):
        assert event.value == pytest.approx(by_step[event.step], rel=1e-5)


def test_tensorboard_lets_go_of_steps_that_a_rollback_to_the_start_took_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value in (((0, 1, 2), 3.0), ((1, 2, 3), 0.3)):
        writer = TensorBoard(tmp_path, 0)
        for step in steps:
            writer.scalars(step, {"learning-rate": value})
        writer.close()
        time.sleep(1.1)  # files are told apart by the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("learning-rate")] == [0, 1, 2, 3]
    assert events.Scalars("learning-rate")[-1].value == pytest.approx(0.3)


def test_wandb_works_offline_without_an_account(run):
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert status(run)["run_id"] in folder.name
    assert any(path.suffix == ".wandb" and path.stat().st_size > 0 for path in folder.iterdir())


def test_a_set_that_is_added_later_gets_a_baseline_then(workers, jobsite, tmp_path):
    """Without one the gate would be off, and nobody would be told."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    domain = f"{{path: {jobsite.folder}/domain.heldout, bucket: domain}}"
    general = f"{{path: {jobsite.folder}/general.heldout, bucket: general}}"
    words = [f"run.dir={run}", "gates.general_perplexity_limit=0.5"]
    workers(1).run("train", config=jobsite.config, overrides=[*words, f"eval.sets=[{domain}]"])
    later = [*words, f"eval.sets=[{domain}, {general}]", "restore.accept=[eval.sets]"]
    workers(1).run("train", config=jobsite.config, overrides=later)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    taken = [(line["step"], list(line["perplexity"])) for line in ledger if line["kind"] == "baseline"]
    assert taken == [(0, ["domain"]), (1, ["general"])]
    assert "general_perplexity_limit" in [verdict["rule"] for verdict in ledger[-1]["verdicts"]]


def test_a_dry_run_prints_the_plan_and_starts_nothing(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    words = [f"run.dir={run}", "parallel.tp=2", "parallel.pp=2", "parallel.sp=true", "restore.accept=[train.tokens]"]
    done = _cli("--config", jobsite.config, "--dry-run", "--world-size", "8", *words)
    assert done.returncode == 0, done.stderr
    assert "8: TP 2 x PP 2 x DP 2" in done.stdout and "nothing was started" in done.stdout
    assert re.search(r"looks: at step 0 and \d+ more, of about [\d,]+ tokens: [\d.]+% of the computing", done.stdout)
    assert "'restore.accept=[train.tokens]'    # writes" in done.stdout  # a command to paste, brackets and all
    assert not run.exists()
    run.mkdir()
    lease = Lease.take(run)
    accepting = [
        "--config",
        jobsite.config,
        "--dry-run",
        "--accept",
        "data",
        "--accept",
        "train.seed",
        f"run.dir={run}",
    ]
    _, out, _ = workers(1).run("command", words=accepting)[0]
    lease.release()
    assert "--accept data --accept train.seed    # writes" in out
    assert f"is held by pid {os.getpid()} on " in out
    refused = ["--config", jobsite.config, "--dry-run", "--world-size", "6", *words]
    code, _, err = workers(1).run("command", words=refused)[0]
    assert code == 2 and "multiple of 4 processes" in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data.max_epochs=0.1"],
        ["data.max_epochs=0.1", "data.at_max_epochs=drop"],
        [
            "data.max_epochs=0.1",
            "data.at_max_epochs=drop",
            "data.curriculum=[{tokens: 9000, weights: {domain: 1}}, {tokens: 9999, weights: {domain: 1, replay: 1}}]",
        ],
        ["data.exclude={domain: [0, 1, 1, 1, 1]}"],
    ],
    ids=lambda words: " ".join(words) or "plain",
)
def test_a_dry_run_counts_the_steps_that_the_run_takes(workers, jobsite, tmp_path, words):
    code, out, err = workers(1).run("command", words=["--config", jobsite.config, "--dry-run", *words])[0]
    assert code == 0, err
    said = int(re.search(r"about ([0-9,]+) of 8 rows", out)[1])
    overrides = [f"run.dir={tmp_path / 'run'}", "eval.sets=[]", *words]
    workers(1).run("train", config=jobsite.config, overrides=overrides)
    assert abs(said - status(tmp_path / "run")["step"]) <= 1


def test_a_launch_that_is_refused_leaves_the_status_of_the_run_that_goes_on(jobsite, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "running", "step": 3}')
    lease = Lease.take(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "cpt_mega.train", "--config", jobsite.config, f"run.dir={run}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:  # as a run does that goes on
        (run / "status.json").touch()
        time.sleep(0.05)
    lease.release()
    assert process.returncode == 2 and "another run is writing here" in process.stderr.read()
    assert json.loads((run / "status.json").read_text()) == {"state": "running", "step": 3}


def test_the_printed_configuration_is_complete(jobsite):
    done = _cli("--config", jobsite.config, "--print-config", "optimizer.lr=3e-5")
    values = yaml.safe_load(done.stdout)
    assert values["optimizer"]["lr"] == 3e-5 and values["gates"]["general_perplexity_limit"] is None
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  lr: ")]
    assert line.endswith("# peak learning rate; 0 changes no weight")


def _cli(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cpt_mega.train", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

"""The command that measures one model with a suite."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import tiny_llama
from tests.helpers.suites import SUITE, write_suite
from tests.helpers.workers import JobFailed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gate.py"
ITEMS = 7 + 9 + 5 + 8 + 1 + 4 + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    tiny_llama(folder / "hf", tokenizer=True, num_hidden_layers=2)
    write_suite(folder)
    return folder


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True)


def test_a_model_is_measured_and_every_item_written_down(folder, tmp_path):
    words = ["--model", folder / "hf", "--suite", folder / "suite.yaml", "precision=fp32", "--json"]
    done = run(*words, "--output", tmp_path / "items.jsonl", "--base", folder / "hf")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["suite"] == "small" and len(found["digests"]) == 7
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(lines) == ITEMS and {line["digest"] for line in lines} == set(found["digests"].values())
    value = next(r["value"] for r in found["readings"] if (r["probe"], r["metric"]) == ("choices", "acc_norm"))
    scores = [line["score"] for line in lines if line["probe"] == "choices"]
    assert value == pytest.approx(sum(scores) / len(scores))


def test_a_table_and_the_next_command(folder):
    done = run("--model", folder / "hf", "--suite", folder / "suite.yaml", "precision=fp32")
    assert done.returncode == 0 and "bits_per_byte" in done.stdout and "next: bash launch/torchrun.sh" in done.stdout
    assert "not measured: drift" in done.stdout


def test_a_suite_that_is_none_is_one_line(folder, tmp_path):
    suite = write_suite(tmp_path, SUITE.replace("kind: lists", "kind: list"))
    done = run("--model", folder / "hf", "--suite", suite)
    assert done.returncode == 2 and not done.stdout and "probes.lists" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_what_a_suite_can_show_is_told_without_measuring(folder):
    words = ("--model", folder / "hf", "--suite", folder / "suite.yaml", "--power")
    done = run(*words, "--looks", "7", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["looks"] == 7
    by_name = {gate["gate"]: gate for gate in told["gates"]}
    assert by_name.keys() == {"general", "answers"}
    assert by_name["general"]["items"] == 7 + 9 + 8 and not by_name["general"]["armed"]
    assert by_name["general"]["probes"] == ["choices", "letters", "lists"]
    done = run(*words)
    assert done.returncode == 0 and "not armed" in done.stdout and "in 20 looks" in done.stdout
    assert "general is not armed: 24 items show no drop" in done.stdout and "10.0% of the" in done.stdout
    lone = "name: a\nprobes:\n  answers: {bucket: general, kind: answers, items: answers.jsonl, max_items: 1}\n"
    (folder / "lone.yaml").write_text(lone)
    done = run("--model", folder / "hf", "--suite", folder / "lone.yaml", "--power")
    assert done.returncode == 0 and "answers is not armed: 1 items fall into panels of" in done.stdout


def test_a_base_with_another_tokenizer_is_refused(workers, folder, tmp_path):
    """The drift between two models is measured on tokens that both read."""
    other = shutil.copytree(folder / "hf", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ids = list(vocabulary.values())
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, [*ids[:4], *ids[:3:-1]], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = {"checkpoint": str(folder / "hf"), "suite": str(folder / "suite.yaml"), "overrides": ["precision=fp32"]}
    with pytest.raises(JobFailed, match="--base = .*other': has another tokenizer or chat template than the model"):
        workers(1).run("gate_jobs.look", **words, base=str(other))


def test_a_model_without_a_tokenizer_is_refused(workers, jobsite, folder):
    words = {"checkpoint": jobsite.checkpoint, "suite": str(folder / "suite.yaml")}
    with pytest.raises(JobFailed, match="tokenizer"):
        workers(1).run("gate_jobs.look", **words, overrides=["precision=fp32"])

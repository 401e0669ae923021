"""Job scripts as Slurm runs them: a copy of the file, elsewhere, with Slurm's variables."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.shards import merge_shards
from cpt_mega.hf.weights import model_digest
from tests.helpers.corpora import TEXTS, write_bpe_tokenizer, write_jsonl
from tests.helpers.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path):
    """``job(script, *options, **environment)``: one job."""

    def run(script, *options, **environment):
        copy = tmp_path / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "launch" / "slurm" / script, copy)
        values = {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": os.environ["PATH"]} | environment
        return subprocess.run(["bash", copy, *options], cwd=copy.parent, env=values, capture_output=True, text=True)

    return run


@pytest.fixture
def task(job):
    """``task(id, first, last, count, *options, **environment)``: one task of an array."""

    def run(number, first, last, count, *options, **environment):
        array = {"ID": number, "MIN": first, "MAX": last, "COUNT": count} if number is not None else {}
        values = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        values |= {"SLURM_CPUS_PER_TASK": "2"} | environment
        return job("preprocess.sbatch", *options, **values)

    return run


def test_an_array_makes_the_shards_of_a_corpus(tmp_path, task):
    source = write_jsonl(tmp_path / "in.jsonl", [f"{text} {number}" for number in range(9000) for text in TEXTS])
    folder = write_bpe_tokenizer(tmp_path / "tokenizer")
    options = ("--input", str(source), "--tokenizer", str(folder), "--output", str(tmp_path / "c"))
    for number in range(2):
        done = task(number, 0, 1, 2, *options)
        assert done.returncode == 0, done.stderr
        assert f"shard {number} of 2 on " in done.stdout and "next: python tools/merge_shards.py" in done.stdout
    (tmp_path / "c.shard-00001-of-00002.manifest.json").unlink()
    again = task(1, 1, 1, 1, *options, SHARDS="2")  # one of them once more
    assert again.returncode == 0, again.stderr
    assert merge_shards(str(tmp_path / "c")).documents == IndexedCorpus(tmp_path / "c").documents == 45_000


@pytest.mark.parametrize(
    ("array", "environment", "message"),
    [
        ((None, 0, 0, 0), {}, "not a job array"),
        ((3, 3, 17, 2), {}, "set SHARDS"),
        ((1, 1, 4, 4), {}, "set SHARDS"),
        ((0, 0, 0, 1), {"SLURM_SUBMIT_DIR": "/"}, "is not the repository"),
    ],
)
def test_what_cannot_be_right_is_refused(task, array, environment, message):
    done = task(*array, "--input", "x.jsonl", **environment)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_checkpoint_in_and_out(tmp_path, job):
    tiny_llama(tmp_path / "hf")
    made = job("convert.sbatch", "import", "--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "import"))
    assert made.returncode == 0, made.stderr
    back = job(
        "convert.sbatch", "export", "--checkpoint", str(tmp_path / "import"), "--output", str(tmp_path / "export")
    )
    assert back.returncode == 0, back.stderr
    assert model_digest(tmp_path / "export") == model_digest(tmp_path / "hf")


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], {}, "'' is neither import nor export"),
        (["both"], {}, "'both' is neither import nor export"),
        (["import"], {"SLURM_SUBMIT_DIR": "/"}, "is not the repository"),
    ],
)
def test_what_is_no_conversion_is_refused(job, words, environment, message):
    done = job("convert.sbatch", *words, **environment)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_mega.data.manifest import load_manifest
from tests.helpers.corpora import TEXTS, write_bpe_tokenizer, write_corpus

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"


def run(folder, *arguments):
    words = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture
def site(tmp_path):
    """A tokenizer, and a corpus as Megatron-LM leaves it: without a manifest."""
    from cpt_mega.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "tokenizer"))
    write_corpus(tmp_path / "c", [tokenizer.document_ids(ids) for ids in tokenizer.encode_batch(TEXTS)])
    return tmp_path


def test_from_foreign_files_to_a_verified_corpus(site):
    assert "none; --write-manifest" in run(site, "c").stdout
    assert run(site, "c", "--verify").returncode == 2
    made = run(site, "c.bin", "--write-manifest", "--tokenizer", "tokenizer", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["manifest"]["documents"] == load_manifest(site / "c").documents == 5
    verified = run(site, "c", "--verify", "--json")
    assert (verified.returncode, json.loads(verified.stdout)["problems"]) == (0, [])
    again = run(site, "c", "--write-manifest", "--tokenizer", "tokenizer")
    assert again.returncode == 2 and "is there already" in again.stderr


def test_a_document_is_shown(site):
    plain = run(site, "c", "--document", 2, "--tokenizer", "tokenizer")
    assert plain.stdout.splitlines()[1] == TEXTS[2] + "<|eos|>"
    found = json.loads(run(site, "c", "--document", 2, "--json").stdout)
    assert found["text"] is None and found["ids"][-1] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "no such file"),
        (["c", "--document", "9"], "--document = 9"),
        (["c", "--write-manifest"], "--tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(site, words, message):
    done = run(site, *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1

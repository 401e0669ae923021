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


def test_how_documents_fill_rows(site):
    told = json.loads(run(site, "c", "--rows", "64", "--json").stdout)
    assert told["documents"] == 5 and told["tokens"] + told["padding"] == 64 * told["rows"]
    chunks = json.loads(run(site, "c", "--rows", "64", "--packing", "concat", "--json").stdout)
    assert chunks["rows"] <= told["rows"] and chunks["tokens"] == told["tokens"]
    for name in ("rows.png", "rows.svg"):
        drawn = run(site, "c", "--rows", "64", "--picture", name)
        assert drawn.returncode == 0, drawn.stderr
        assert f"next: open {name}" in drawn.stdout and (site / name).stat().st_size > 5000
    refused = run(site, "c", "--rows", "64", "--picture", "rows.gif")
    assert refused.returncode == 2 and "ends in .png or .svg" in refused.stderr
    assert "documents a row" in refused.stdout  # the numbers are there all the same
    assert "--rows = 0" in run(site, "c", "--rows", "0").stderr
    assert run(site).returncode == 2 and "name a corpus, or a run" in run(site).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["c", "--picture", "rows.png"], "--picture = 'rows.png': goes with --rows"),
        (["c", "--packing", "concat"], "--packing = 'concat': goes with --rows"),
        (["c", "--step", "1"], "--step = '1': goes with --run"),
        (["--run", "r", "--rows", "8"], "--rows = '8': goes with PREFIX"),
        (["--run", "r", "--step", "2", "--verify"], "--verify = 'True': goes with PREFIX"),
    ],
)
def test_no_option_is_passed_over(site, words, message):
    done = run(site, *words)
    assert done.returncode == 2 and message in done.stderr

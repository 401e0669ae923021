"""The main job, as the README has it, into the folder where a user would have it: a second run finds it done."""

import json
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "quickstart"


@pytest.mark.timeout(900)
def test_the_quickstart_keeps_what_it_promises():
    command = ["bash", str(ROOT / "launch" / "quickstart.sh")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    summary = json.loads((FOLDER / "summary.json").read_text())
    domain, general = (summary["perplexity"][bucket] for bucket in ("domain", "general"))
    assert domain[1] <= 0.8 * domain[0]
    assert general[1] <= 1.05 * general[0]
    assert summary["max_logprob_difference"] <= 1e-4
    assert summary["seconds"] < 480
    for name in ("base", "export"):
        assert (FOLDER / name / "config.json").is_file() and (FOLDER / name / "tokenizer.json").is_file()

    begin = time.monotonic()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and time.monotonic() - begin < 20
    assert json.loads((FOLDER / "summary.json").read_text()) == summary
    assert again.stdout.count("earlier") == 14

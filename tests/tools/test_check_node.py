"""tools/check_node.py as a job script runs it: a line a machine, and a code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_node.py"


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_what_is_wrong_is_one_line_under_slurms_name_and_70(tmp_path):
    done = _run("--folder", str(tmp_path), "--clock", "1000", SLURMD_NODENAME="gpu017")
    assert done.returncode == 70 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("gpu017: not fit: its clock is +")
    told = json.loads(_run("--folder", str(tmp_path), "--clock", "1000", "--json", SLURMD_NODENAME="gpu017").stdout)
    assert (told["machine"], told["fit"]) == ("gpu017", False) and told["problems"][0].startswith("its clock")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folder", "/no/such/folder"], "--folder = '/no/such/folder': is no folder"),
        (["--together", "host:1"], "--together = 'host:1': is for a step of several tasks; start it with srun"),
    ],
)
def test_wrong_use_is_one_line_and_2(words, message):
    done = _run(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1

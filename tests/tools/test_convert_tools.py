"""tools/import_hf.py and tools/export_hf.py as a user runs them: from any folder, tables, JSON, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import tiny_llama

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(name, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    tiny_llama(folder / "hf")
    done = run_tool("import_hf.py", "--hf", "hf", "--output", "ckpt", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "model.checkpoint=ckpt" in done.stdout
    return folder


def test_export_with_json(imported):
    arguments = ("--checkpoint", "ckpt", "--output", "out", "--dtype", "bfloat16", "--json")
    done = run_tool("export_hf.py", *arguments, cwd=imported)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["dtype"] == "bfloat16" and report["files"] == ["model.safetensors"]


def test_bad_input_is_one_line_and_exit_2(imported):
    done = run_tool("export_hf.py", "--checkpoint", "hf", "--output", "new", cwd=imported)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "import it first" in done.stderr and not (imported / "new").exists()


def test_output_is_never_overwritten(imported):
    done = run_tool("import_hf.py", "--hf", "hf", "--output", "ckpt", cwd=imported)
    assert done.returncode == 2 and "not empty" in done.stderr

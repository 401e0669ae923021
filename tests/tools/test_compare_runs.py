"""The command: verdict, exit code, JSON. Runs of the trainer itself are compared in tests/loop/test_comparison.py."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool within this process, which has torch already: ``(exit code, standard output, standard error)``."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def write_run(folder, losses, first_step=1):
    """A run of which only the metrics are left."""
    folder.mkdir()
    lines = [
        {"kind": "train", "step": step, "tokens": 10 * step, "loss": loss, "tokens_per_s_device": hash(folder.name)}
        for step, loss in enumerate(losses, start=first_step)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_equal_differing_and_within_the_tolerance(tmp_path, tool):
    a = write_run(tmp_path / "a", [3.0, 2.0, float("nan")])
    same = write_run(tmp_path / "same", [3.0, 2.0, float("nan")])
    other = write_run(tmp_path / "other", [3.0, 2.5, 1.0, 0.5])
    code, out, err = tool(a, same)
    assert (code, err) == (0, "") and out.startswith("equal in everything that was compared\n")
    code, out, _ = tool(a, other)
    assert code == 1 and f"next: diff {a}/config.yaml {other}/config.yaml" in out
    verdict = "first difference: loss (metrics) at step 2: 2.0 in A, 2.5 in B; absolute 0.5, relative 0.2\n"
    assert out.startswith(verdict)
    code, out, _ = tool(a, other, "--tolerance", "0.2", "--json")
    past = json.loads(out)
    assert code == 1 and (past["first"]["step"], past["metrics"]["within"], past["metrics"]["equal"]) == (3, 1, 1)
    code, out, _ = tool(write_run(tmp_path / "close", [3.0, 2.0001]), a, "--tolerance", "1e-3")
    assert code == 0 and out.startswith("equal within a tolerance of 0.001 in everything that was compared\n")


def test_json_names_what_was_not_compared(tmp_path, tool):
    a, b = write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [3.0, 2.0, 1.0])
    told = json.loads(tool(a, b, "--json")[1])
    assert told["equal"] and told["exact"] and told["first"] is None
    assert "metrics: steps that only B has: 3" in told["not_compared"]
    for part in ("data: ", "weights: ", "readings: ", "configuration: "):
        assert any(sentence.startswith(part) for sentence in told["not_compared"]), part


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "absent"], "absent': no such folder"),
        (["empty", "a"], "holds no metrics.jsonl, ledger.jsonl or checkpoints"),
        (["a", "later"], "nothing in it can be compared with"),
        (["a", "a", "--tolerance", "-1"], "--tolerance = -1.0"),
        (["a", "a", "--tolerance", "nan"], "--tolerance = nan"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, tool, words, message):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "later", [2.0, 1.0], first_step=3)
    (tmp_path / "empty").mkdir()
    code, out, err = tool(*(tmp_path / word for word in words[:2]), *words[2:])
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_help_loads_no_torch():
    code = f"import sys, runpy\nsys.argv = ['tool', '--help']\ntry:\n    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    sys.exit(end.code or int('torch' in sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Exit code 0" in done.stdout

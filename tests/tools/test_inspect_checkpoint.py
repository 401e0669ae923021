"""The command on runs of the trainer: a table, a difference, a family tree (odd ones: tests/checkpoint/test_family.py)."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.hf.weights import model_digest

TOOL = "inspect_checkpoint.py"
PATH = Path(__file__).resolve().parents[2] / "tools" / TOOL


def told(tool, *arguments):
    code, out, err = tool(TOOL, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def row_of(out, name):
    """A table's row, the lines of its cell joined."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"│ {name} "))
    taken = [lines[start], *lines[start + 1 :]]
    cells = [line.split("│")[1:3] for line in taken if line.startswith("│")]
    rest = next((i for i, (key, _) in enumerate(cells) if i and key.strip()), len(cells))
    return " ".join(text.strip() for _, text in cells[:rest])


def test_a_run_is_its_newest_checkpoint_with_all_that_it_carries(runs, checkpoint_tool):
    newest, state = runs.checkpoints("first")[-1], runs.state("first")
    found = told(checkpoint_tool, runs.folder / "first")
    assert (found["path"], found["type"], found["sealed"]) == (str(newest), "checkpoint", True)
    for name in ("run_id", "step", "tokens", "kind", "layout", "config"):
        assert found[name] == state[name], name
    carried = ("weights", "parent_weights", "base_digest", "corpora", "eval", "packing_version", "code", "libraries")
    for name in (*carried, "restore"):
        assert found[name] == state["lineage"][name] is not None, name
    assert sum(found["tokens_by_source"].values()) == found["tokens"]
    assert (found["health"], found["precision"], found["kind"]) == ("perplexity only", "fp32", "permanent")
    now, before = state["gate_history"][-1]["perplexity"]["general"], state["baseline"]["general"]
    assert found["readings"]["general"] == {"perplexity": now, "baseline": before, "rise": now / before - 1}
    assert found["parent"] == {"path": str(runs.base), "found": True, "run_id": None, "step": None, "weights": None}
    weights, optimizer = found["tensors"]["weights"], found["tensors"]["optimizer"]
    assert optimizer["count"] == 3 * weights["count"] and optimizer["elements"] == 3 * weights["elements"]
    assert weights["dtypes"] == {"float32": weights["count"]}
    assert found["bytes"] == sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def test_the_table_of_a_checkpoint(runs, checkpoint_tool):
    state = runs.state("first", 0)
    code, out, _ = checkpoint_tool(TOOL, runs.checkpoints("first")[0])
    assert code == 0 and f"next: python tools/verify_checkpoint.py {runs.checkpoints('first')[0]}" in out
    assert row_of(out, "is") == f"a checkpoint of run {state['run_id']}, step 1"
    assert row_of(out, "kind") == "rolling" and row_of(out, "sealed") == "yes"
    assert row_of(out, "health").startswith("perplexity only; domain perplexity ") and "since step 0" in row_of(
        out, "health"
    )
    assert row_of(out, "parent") == f"{runs.base} (an import)"
    assert row_of(out, "weights") == state["lineage"]["weights"][:12]
    assert row_of(out, "saved at") == "tp 1, pp 1, vpp 1, cp 1, dp 1; fp32"
    assert row_of(out, "tokens").startswith("256: domain ") and "optimizer: 27 (27 float32)" in row_of(out, "tensors")
    code, out, _ = checkpoint_tool(TOOL, runs.folder / "moved" / "second")
    parent, step = runs.checkpoints("first")[0], runs.state("first", 0)["step"]
    assert row_of(out, "parent") == f"{parent} (run {state['run_id']}, step {step})"
    assert row_of(out, "health").startswith("not judged; ")  # no gate was armed
    assert "which is not there now" in row_of(checkpoint_tool(TOOL, runs.folder / "third")[1], "parent")


def test_an_import_says_what_it_has_not(runs, checkpoint_tool):
    found = told(checkpoint_tool, runs.base)
    assert (found["type"], found["run_id"], found["step"], found["config"]) == ("import", None, None, None)
    assert found["tensors"]["optimizer"]["count"] == 0 and not found["has_fingerprints"]
    out = checkpoint_tool(TOOL, runs.base)[1]
    assert row_of(out, "is") == "an import: weights alone, of no run" and "│ tokens" not in out
    assert row_of(out, "base").startswith(f"{found['base_digest'][:12]}, from ")


@pytest.fixture
def bare(runs, tmp_path):
    """A checkpoint as older code left it, with the fewest fields, and not sealed."""
    folder = tmp_path / "bare"
    shutil.copytree(runs.checkpoints("first")[0], folder)
    for name in ("COMPLETE", "fingerprints.json"):
        (folder / name).unlink()
    (folder / "trainer_state.json").write_text('{"format": 1, "run_id": "old", "parent": "/gone", "step": 1}')
    return folder


def test_what_older_code_did_not_record_is_said(bare, checkpoint_tool):
    code, out, err = checkpoint_tool(TOOL, bare)
    assert (code, err) == (0, "")
    for name in ("tokens", "kind", "health", "began with weights", "corpora", "evaluation", "code", "libraries"):
        assert row_of(out, name) == "not recorded", name
    assert row_of(out, "weights") == "not recorded"
    assert row_of(out, "restore mode") == "began by not recorded, last started by not recorded"
    assert row_of(out, "saved at") == "not recorded; not recorded"
    assert row_of(out, "sealed").startswith("no") and row_of(out, "is") == "a checkpoint of run old, step 1"


@pytest.mark.parametrize("junk", [None, 3, -1.5, "word", [], [1], {}, {"a": None}, True])
def test_fields_of_any_type_are_no_crash(bare, runs, checkpoint_tool, junk):
    names = [field.name for field in fields(TrainerState)]
    lineage = dict.fromkeys(runs.state("first")["lineage"], junk)
    for values in (dict.fromkeys(names, junk), dict.fromkeys(names, junk) | {"lineage": lineage}):
        (bare / "trainer_state.json").write_text(json.dumps({"format": 1, **values}))
        for words in ([bare], [bare, "--json"], [bare, "--other", runs.folder / "first"]):
            assert checkpoint_tool(TOOL, *words)[0] == 0


def test_an_index_that_cannot_be_read_is_said(bare, checkpoint_tool):
    next(bare.glob("*.distcp")).unlink()
    code, out, _ = checkpoint_tool(TOOL, bare)
    assert code == 0 and "the index cannot be read" in row_of(out, "tensors")


def test_the_difference_of_two_checkpoints_of_a_run(runs, checkpoint_tool):
    a, b = runs.checkpoints("first")[0], runs.checkpoints("first")[-1]
    found = told(checkpoint_tool, a, "--other", b)
    states = runs.state("first", 0), runs.state("first", -1)
    by_field = {one["field"]: (one["a"], one["b"]) for one in found["state"]}
    for name in ("step", "tokens", "kind", "gate_history"):
        assert by_field[name] == tuple(state[name] for state in states), name
    assert [one["field"] for one in found["lineage"]] == ["weights"]
    assert found["config"] == found["model"] == found["tensors"] == [] and found["only_in"] == [[], []]
    names = json.loads((a / "fingerprints.json").read_text()).keys()
    assert set(found["values"]) <= names and found["equal_values"] == len(names) - len(found["values"])
    out = checkpoint_tool(TOOL, a, "--other", b)[1]
    assert f"{len(found['values'])} of {len(names)} tensors have other values" in row_of(out, "values")
    assert row_of(out, "configuration") == "the same" and "step: 1 in A, 5 in B" in row_of(out, "state")
    same = told(checkpoint_tool, a, "--other", a)
    assert not any(same[part] for part in ("lineage", "config", "state", "model", "tensors", "values", "not_compared"))
    assert same["equal_values"] == len(names)


def test_only_the_tensors_with_other_fingerprints_are_named(runs, checkpoint_tool, tmp_path):
    a, b = runs.checkpoints("first")[0], tmp_path / "other"
    shutil.copytree(a, b)
    marks = json.loads((a / "fingerprints.json").read_text())
    marks["decoder.final_layernorm.weight"] = "0" * 32
    (b / "fingerprints.json").write_text(json.dumps(marks))
    assert told(checkpoint_tool, a, "--other", b)["values"] == ["decoder.final_layernorm.weight"]


def test_a_checkpoint_and_an_import(runs, checkpoint_tool):
    found = told(checkpoint_tool, runs.folder / "first", "--other", runs.base)
    assert found["values"] == [] and all(key.startswith("optimizer.") for key in found["only_in"][0])
    said = " ".join(found["not_compared"])
    assert f"{runs.base} has no fingerprints.json" in said and f"{runs.base} is an import" in said
    out = checkpoint_tool(TOOL, runs.folder / "first", "--other", runs.base)[1]
    assert row_of(out, "values") == "not compared" and "only in A: optimizer." in row_of(out, "tensors")


def test_configurations_that_differ_are_told_by_field(runs, checkpoint_tool):
    found = told(checkpoint_tool, runs.folder / "first", "--other", runs.folder / "third")
    by_field = {one["field"]: (one["a"], one["b"]) for one in found["config"]}
    assert by_field["train.tokens"] == (1000, 300) and by_field["restore.mode"] == ("auto", "weights")


def test_the_family_in_json(runs, checkpoint_tool):
    found = told(checkpoint_tool, runs.folder, "--tree")
    kinds = {node["path"]: node["type"] for node in found["nodes"]}
    second, third = runs.folder / "moved" / "second", runs.folder / "third"
    assert kinds[str(runs.base)] == "import"
    assert [Path(path).name for path, kind in kinds.items() if kind == "run"] == ["first", "second", "third"]
    started = {Path(edge["to"]).name: edge for edge in found["edges"] if edge["type"] == "started"}
    assert (started["first"]["from"], started["first"]["by"]) == (str(runs.base), "path")
    assert (started["second"]["from"], started["second"]["by"]) == (str(runs.checkpoints("first")[0]), "path")
    assert (started["third"]["from"], started["third"]["by"]) == (str(runs.checkpoints("moved/second")[-1]), "weights")
    assert started["third"]["to"] == str(third) and str(runs.folder / "second") in started["third"]["note"]
    held = [edge["to"] for edge in found["edges"] if edge["type"] == "holds" and edge["from"] == str(second)]
    assert held == [str(path) for path in runs.checkpoints("moved/second")]
    assert all(node["missing"] is None for node in found["nodes"] if node["type"] == "run")


def test_the_family_as_a_tree(runs, checkpoint_tool):
    code, out, err = checkpoint_tool(TOOL, runs.folder, "--tree")
    lines = out.splitlines()
    at = {
        word: next(i for i, line in enumerate(lines) if word in line)
        for word in ("import ", "in first", "in moved/second", "in third")
    }
    assert (code, err) == (0, "") and list(at.values()) == sorted(at.values())
    depth = {word: len(lines[i]) - len(lines[i].lstrip("│├└─ \xa0")) for word, i in at.items()}
    assert list(depth.values()) == sorted(set(depth.values()))  # each below the one that it came from
    assert "in third, found by weights" in out
    assert "step 1: 256 tokens, rolling, perplexity only, domain " in lines[at["in first"] + 1]
    assert "in moved/second" in lines[at["in first"] + 2]


def test_a_run_without_its_parent_says_what_it_misses(runs, checkpoint_tool, tmp_path):
    shutil.copytree(runs.folder / "third", tmp_path / "third")
    out = checkpoint_tool(TOOL, tmp_path, "--tree")[1]
    name = model_digest(runs.checkpoints("moved/second")[-1])  # read, not recorded
    assert f"its parent is not found: {runs.folder / 'second'}" in out and f"weights {name[:12]}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "no such folder"),
        (["."], "not a complete checkpoint"),
        ([".", "--tree"], "holds no complete checkpoint"),
        ([".", "--tree", "--other", "."], "does not go with --tree"),
        (["torn"], "trainer_state.json': cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, checkpoint_tool, words, message, monkeypatch):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "trainer_state.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    code, out, err = checkpoint_tool(TOOL, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("words", [["--help"], ["RUNS", "--tree"]])
def test_neither_the_help_nor_the_tree_loads_torch(runs, words):
    words = [str(runs.folder) if word == "RUNS" else word for word in words]
    code = f"import sys, runpy\nsys.argv = ['tool', *{words!r}]\ntry:\n    runpy.run_path({str(PATH)!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    sys.exit(end.code or int('torch' in sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr

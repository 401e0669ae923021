"""Who came from whom, where paths lie, are gone, or hold something else by now; folders with JSON alone."""

import json

import pytest

from cpt_mega.checkpoint.family import BASE, PATH, WEIGHTS, Link, read_family
from cpt_mega.errors import InputError


def write_folder(folder, base="b0", **state):
    """A sealed folder as a run, or without a state an import, leaves it: what a look at the family reads of it."""
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"base_digest": base, "source": "somewhere"}))
    if state:
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "manifest.json").write_text('{"files": {}}')
    (folder / "COMPLETE").touch()
    return folder


def write_checkpoint(run, step, parent, weights, parent_weights, **more):
    lineage = {"weights": weights, "parent_weights": parent_weights}
    folder = run / "checkpoints" / f"iter_{step:07d}"
    return write_folder(folder, run_id=run.name, parent=str(parent), step=step, lineage=lineage, **more)


def link(family, run):
    return family.links[run.resolve()]


def test_paths_that_are_there_count_and_elsewhere_they_are_read_too(tmp_path):
    base = write_folder(tmp_path / "elsewhere" / "base")
    outside = write_checkpoint(tmp_path / "elsewhere" / "a", 4, base, "wa", "w0")
    write_checkpoint(tmp_path / "elsewhere" / "a", 8, base, "wa8", "w0")
    write_checkpoint(tmp_path / "runs" / "b", 2, outside, "wb", "wa")
    family = read_family(tmp_path / "runs")
    assert link(family, tmp_path / "runs" / "b") == Link(outside, PATH)
    assert link(family, tmp_path / "elsewhere" / "a").parent == base
    steps = [one.step for one in family.runs[tmp_path / "elsewhere" / "a"].checkpoints]
    assert steps == [4] and family.orphans == []  # what nobody came from is not in the folder that was asked for


def test_a_path_that_holds_another_model_by_now_gives_way_to_the_weights_name(tmp_path):
    base = write_folder(tmp_path / "base")
    old = write_checkpoint(tmp_path / "kept" / "old", 4, base, "w-old", "w0")
    reused = write_checkpoint(tmp_path / "a", 4, base, "w-new", "w0")
    write_checkpoint(tmp_path / "b", 2, reused, "wb", "w-old")
    found = link(read_family(tmp_path), tmp_path / "b")
    assert (found.parent, found.by) == (old, WEIGHTS) and str(reused) in found.note


def test_another_name_at_the_path_and_nobody_else_who_has_it_is_told(tmp_path):
    """A run in bf16 from a checkpoint in fp32: its weights are rounded, so their name is another one."""
    parent = write_checkpoint(tmp_path / "a", 4, write_folder(tmp_path / "base"), "w-fp32", "w0")
    write_checkpoint(tmp_path / "b", 2, parent, "wb", "w-bf16")
    found = link(read_family(tmp_path), tmp_path / "b")
    assert (found.parent, found.by) == (parent, PATH) and "another name now" in found.note


def test_an_import_that_moved_is_known_by_its_runs_and_by_its_base(tmp_path):
    base = write_folder(tmp_path / "base")
    write_checkpoint(tmp_path / "a", 1, base, "wa", "w0")
    write_checkpoint(tmp_path / "b", 1, "/gone/base", "wb", "w0")
    write_checkpoint(tmp_path / "c", 1, "/gone/base", "wc", "w0-bf16")
    write_checkpoint(tmp_path / "d", 1, "/gone/run/checkpoints/iter_0000007", "wd", "w7")
    family = read_family(tmp_path)
    assert {run: link(family, tmp_path / run).by for run in "abcd"} == {"a": PATH, "b": WEIGHTS, "c": BASE, "d": ""}
    assert {link(family, tmp_path / run).parent for run in "abc"} == {base}
    (orphan,) = [node for node in family.to_json()["nodes"] if node.get("missing")]
    assert orphan["run_id"] == "d"
    assert orphan["missing"] == {"path": "/gone/run/checkpoints/iter_0000007", "weights": "w7"}


def test_another_base_at_the_path_is_not_the_parent(tmp_path):
    base = write_folder(tmp_path / "base", base="another")
    write_checkpoint(tmp_path / "a", 1, base, "wa", "w0")
    assert link(read_family(tmp_path), tmp_path / "a").parent is None


def test_nobody_descends_from_himself(tmp_path):
    """Runs that change nothing have weights of one name, and each could be the other's parent."""
    first = write_checkpoint(tmp_path / "a", 1, "/gone/checkpoints/iter_0000001", "same", "same")
    write_checkpoint(tmp_path / "b", 1, first, "same", "same")
    family = read_family(tmp_path)
    assert link(family, tmp_path / "a").parent is None and link(family, tmp_path / "b").parent == first


def test_older_code_and_what_cannot_be_read(tmp_path):
    write_folder(tmp_path / "old" / "checkpoints" / "iter_0000003", run_id="old", step=3)
    write_folder(tmp_path / "odd" / "checkpoints" / "iter_0000001", run_id=5, lineage=[], stream=3, gate_history=[1])
    (write_folder(tmp_path / "open" / "checkpoints" / "iter_0000002", run_id="open") / "COMPLETE").unlink()
    (write_folder(tmp_path / "torn" / "checkpoints" / "iter_0000002", run_id="t") / "trainer_state.json").write_text(
        "{"
    )
    family = read_family(tmp_path)
    nodes = {node["path"]: node for node in family.to_json()["nodes"] if node["type"] == "checkpoint"}
    old = nodes[str(tmp_path / "old" / "checkpoints" / "iter_0000003")]
    names = ("run_id", "step", "tokens", "kind", "health", "weights", "readings")
    assert [old[name] for name in names] == ["old", 3, None, None, None, None, {}]
    assert len(nodes) == 2 and [run.folder.name for run in family.orphans] == ["odd", "old"]
    assert len(family.passed_over) == 2
    assert "iter_0000002: not complete" in family.passed_over[0] and "torn" in family.passed_over[1]


def test_a_folder_without_checkpoints_is_bad_input(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="give a folder of runs"):
            read_family(folder)

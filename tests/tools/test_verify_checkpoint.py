"""The command on checkpoints of the trainer: what is good is verified, and each damage is named by file or tensor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex

from cpt_mega.hf.untrusted import read_metadata
from cpt_mega.hf.weights import model_digest
from cpt_mega.lineage import seal_folder

TOOL = "verify_checkpoint.py"
PATH = Path(__file__).resolve().parents[2] / "tools" / TOOL
WEIGHT = "decoder.layers.mlp.linear_fc1.weight"
MOMENT = f"optimizer.state.exp_avg_sq.{WEIGHT}"


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run, to damage."""
    shutil.copytree(runs.folder / "first", tmp_path / "first")
    return tmp_path / "first"


def newest(run):
    return max((run / "checkpoints").glob("iter_*"))


def told(tool, *arguments):
    code, out, err = tool(TOOL, *arguments, "--json")
    assert not err
    return code, json.loads(out)


def problems(tool, folder):
    """``{file or tensor: what is said}`` of one folder that does not verify; the printed lines say the same."""
    code, found = told(tool, folder)
    (one,) = found["folders"]
    assert (code, found["good"], one["good"]) == (1, False, False)
    said = {problem["what"]: problem["text"] for problem in one["problems"]}
    printed = tool(TOOL, folder)
    assert printed[0] == 1
    for what, text in said.items():
        assert f"  {what}: {text}" in printed[1].splitlines()
    return said


def seal_again(folder):
    """So that every size and digest matches what lies there."""
    (folder / "COMPLETE").unlink()
    seal_folder(folder)


def overwrite(folder, key, place, change):
    """Changes bytes of a stored tensor; ``place``: how far into it, as a share."""
    metadata = read_metadata(folder)
    offsets = metadata.state_dict_metadata[key].chunks[0].offsets
    stored = metadata.storage_data[MetadataIndex(key, offsets)]
    with open(folder / stored.relative_path, "r+b") as stream:
        at = stored.offset + int(stored.length * place)
        stream.seek(at)
        before = stream.read(8)
        stream.seek(at)
        stream.write(change(before))
    return stored.relative_path


def flip(content):
    return bytes([content[0] ^ 1]) + content[1:]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_run_its_checkpoints_and_its_base_verify(runs, checkpoint_tool):
    code, found = told(checkpoint_tool, runs.folder / "first")
    (one,) = found["folders"]
    state = runs.state("first")
    assert (code, one["path"], one["step"]) == (0, str(runs.checkpoints("first")[-1]), state["step"])
    assert one["weights"] == one["recorded"] == state["lineage"]["weights"] and one["not_checked"] == []
    code, found = told(checkpoint_tool, runs.folder / "first", "--all")
    steps = [one["step"] for one in found["folders"]]
    assert code == 0 and steps == sorted(steps) and len(steps) == len(runs.checkpoints("first")) > 2
    code, found = told(checkpoint_tool, runs.base)
    (one,) = found["folders"]
    assert (code, one["type"], one["weights"]) == (0, "import", state["lineage"]["parent_weights"])
    assert len(one["not_checked"]) == 2


def test_what_was_checked_is_printed_with_the_next_command(runs, checkpoint_tool):
    code, out, _ = checkpoint_tool(TOOL, runs.folder / "first")
    assert code == 0 and out.startswith(f"{runs.checkpoints('first')[-1]}: verified\n")
    assert "36 tensors against fingerprints.json" in out and runs.state("first")["lineage"]["weights"] in out
    command = f"bash launch/torchrun.sh {runs.folder / 'first' / 'config.yaml'}"
    assert f"next: {command}\n" in out


def test_an_hf_folder_has_a_name_and_nothing_to_hold_it_against(runs, jobsite, checkpoint_tool):
    code, out, _ = checkpoint_tool(TOOL, jobsite.hf)
    assert code == 0 and model_digest(jobsite.hf) in out and "there is nothing to hold it against" in out


def test_another_name_than_the_expected_one(runs, jobsite, checkpoint_tool):
    name = model_digest(jobsite.hf)
    for folder in (jobsite.hf, runs.base):
        assert checkpoint_tool(TOOL, folder, "--expect-weights", name[:12])[0] == 0
    code, out, _ = checkpoint_tool(TOOL, runs.folder / "first", "--expect-weights", name)
    own = runs.state("first")["lineage"]["weights"]
    assert code == 1 and f"  weights: their name is {own}, not {name}\n" in out


def test_a_flipped_bit_is_found_by_the_seal_and_by_the_fingerprint(run, checkpoint_tool):
    file = overwrite(newest(run), WEIGHT, 0.5, flip)
    said = problems(checkpoint_tool, newest(run))
    assert said.keys() == {file, f"tensor {WEIGHT}", "trainer_state.json"} and "another SHA-256" in said[file]
    assert f"next: python tools/verify_checkpoint.py {run / 'checkpoints'} --all\n" in checkpoint_tool(TOOL, run)[1]


def test_a_flipped_bit_under_a_seal_of_its_own_is_found_by_the_fingerprint(run, checkpoint_tool):
    overwrite(newest(run), WEIGHT, 0.5, flip)
    seal_again(newest(run))
    said = problems(checkpoint_tool, newest(run))
    assert said.keys() == {f"tensor {WEIGHT}", "trainer_state.json"}
    assert said[f"tensor {WEIGHT}"] == "its values are not those that fingerprints.json records"
    assert model_digest(newest(run)) in said["trainer_state.json"]  # it says another name than they have


def test_a_flipped_bit_of_the_optimizer_does_not_change_the_name(run, checkpoint_tool):
    overwrite(newest(run), MOMENT, 0.5, flip)
    seal_again(newest(run))
    assert problems(checkpoint_tool, newest(run)).keys() == {f"tensor {MOMENT}"}


def test_bytes_that_are_no_tensor_are_named_by_it(run, checkpoint_tool):
    overwrite(newest(run), MOMENT, 0.0, lambda before: b"\0" * len(before))
    seal_again(newest(run))
    said = problems(checkpoint_tool, newest(run))
    assert said.keys() == {f"tensor {MOMENT}"} and "cannot be read" in said[f"tensor {MOMENT}"]


def test_missing_and_extra_files(run, checkpoint_tool):
    folder = newest(run)
    (folder / "hf" / "config.json").rename(folder / "hf" / "config.json.kept")
    said = problems(checkpoint_tool, folder)
    assert said["hf/config.json"] == "is missing"
    assert said["hf/config.json.kept"] == "is in the folder and not in its seal"
    assert "config.json" in said["model.json"]


def test_a_missing_tensor_file(run, checkpoint_tool):
    file = next(newest(run).glob("*.distcp"))
    file.unlink()
    said = problems(checkpoint_tool, newest(run))
    assert said[file.name] == "is missing" and file.name in said[".metadata"]


def test_a_shortened_file(run, checkpoint_tool):
    path = newest(run) / "common.pt"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(checkpoint_tool, newest(run)) == {"common.pt": f"has {size - 1:,} bytes, {size:,} were sealed"}


def test_an_edited_trainer_state(run, checkpoint_tool):
    folder = newest(run)
    edit_json(folder / "trainer_state.json", lambda state: state.update(tokens=0))
    assert problems(checkpoint_tool, folder).keys() == {"trainer_state.json"}
    edit_json(folder / "trainer_state.json", lambda state: state["lineage"].update(weights="0" * 64))
    seal_again(folder)
    said = problems(checkpoint_tool, folder)["trainer_state.json"]
    assert said == f"says that the weights are {'0' * 64}; they are {model_digest(folder)}"


def test_edited_fingerprints(run, checkpoint_tool):
    folder = newest(run)

    def change(marks):
        marks[WEIGHT] = "0" * 32
        marks["nobody"] = marks.pop(MOMENT)

    edit_json(folder / "fingerprints.json", change)
    seal_again(folder)
    said = problems(checkpoint_tool, folder)
    assert said.keys() == {f"tensor {WEIGHT}", "tensor nobody", "fingerprints.json"}
    assert MOMENT in said["fingerprints.json"]
    (folder / "fingerprints.json").write_text('{"a": "short"}')
    seal_again(folder)
    assert problems(checkpoint_tool, folder).keys() == {"fingerprints.json"}


def test_another_configuration_than_the_model_s(run, checkpoint_tool):
    folder = newest(run)
    edit_json(folder / "hf" / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    seal_again(folder)
    said = problems(checkpoint_tool, folder)
    assert said.keys() == {"model.json"} and "disagree" in said["model.json"]


def test_an_index_that_is_not_the_model_s(run, runs, checkpoint_tool):
    folder = newest(run)
    for name in ("model.json", "hf/config.json"):
        where = folder / name
        edit_json(where, lambda value: value.get("shape", value).update({"layers": 3, "num_hidden_layers": 3}))
    edit_json(folder / "model.json", lambda value: value["shape"].pop("num_hidden_layers"))
    edit_json(folder / "hf" / "config.json", lambda value: value.pop("layers"))
    seal_again(folder)
    said = problems(checkpoint_tool, folder)
    assert said.keys() == {".metadata"} and "must have shape [3, " in said[".metadata"]


def test_a_folder_that_was_not_sealed_or_whose_seal_is_torn(run, checkpoint_tool):
    (newest(run) / "manifest.json").write_text("{")
    assert problems(checkpoint_tool, newest(run)).keys() == {"manifest.json"}
    (newest(run) / "COMPLETE").unlink()
    assert problems(checkpoint_tool, newest(run)).keys() == {"COMPLETE"}


def test_what_older_code_did_not_record_is_not_checked_and_said(run, checkpoint_tool):
    folder = newest(run)
    (folder / "fingerprints.json").unlink()
    edit_json(folder / "trainer_state.json", lambda state: state["lineage"].pop("weights"))
    seal_again(folder)
    code, found = told(checkpoint_tool, folder)
    (one,) = found["folders"]
    assert code == 0 and one["weights"] == model_digest(folder) and one["recorded"] is None
    assert len(one["not_checked"]) == 2 and all("older code" in words for words in one["not_checked"])


def test_all_names_the_newest_that_verifies(run, checkpoint_tool):
    folders = sorted((run / "checkpoints").glob("iter_*"))
    overwrite(folders[-1], WEIGHT, 0.5, flip)
    seal_again(folders[-1])
    code, out, _ = checkpoint_tool(TOOL, run, "--all")
    assert code == 1 and f"{len(folders) - 1} of {len(folders)}, the newest {folders[-2]}" in out
    assert f"next: mv {folders[-1]} {folders[-1]}.damaged  # the run then goes on from {folders[-2].name}" in out
    folders[-1].rename(f"{folders[-1]}.damaged")  # as it says
    assert checkpoint_tool(TOOL, run, "--all")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "no such folder"),
        (["."], "not a complete checkpoint"),
        ([".", "--all"], "--all goes with a run"),
        (["absent", "--all"], "--all goes with a run"),
        ([".", "--expect-weights", "abc"], "first 12 or more hexadecimal digits"),
        ([".", "--all", "--expect-weights", "0" * 12], "leave --all out"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, checkpoint_tool, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = checkpoint_tool(TOOL, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_help_loads_no_torch():
    code = f"import sys, runpy\nsys.argv = ['tool', '--help']\ntry:\n    runpy.run_path({str(PATH)!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    sys.exit(end.code or int('torch' in sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Exit code 0" in done.stdout

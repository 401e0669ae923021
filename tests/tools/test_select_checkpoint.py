"""The command on a run whose rate rises until it unlearns what it had learnt: an interior checkpoint is the one to take."""

import json
import shutil

import pytest

from cpt_mega.checkpoint.trainer_state import read_state
from cpt_mega.gates.selection import choose
from cpt_mega.hf.convert import import_hf
from cpt_mega.hf.weights import model_digest
from cpt_mega.loop.run_folder import read_lines
from tests.helpers.models import tiny_llama
from tests.helpers.suites import SUITE, write_suite

TOOL = "select_checkpoint.py"


@pytest.fixture(scope="module")
def run(workers, jobsite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    tiny_llama(folder / "hf", tokenizer=True, num_hidden_layers=1)
    import_hf(folder / "hf", folder / "import")
    suite = write_suite(folder, SUITE.replace("name: small", "name: small\nweights: {general: 2}"))
    words = [
        f"run.dir={folder / 'run'}",
        f"model.checkpoint={folder / 'import'}",
        f"gates.suite={suite}",
        "gates.look_share=null",
        "train.tokens=3000",
        "eval.interval_tokens=500",
        "eval.dense_start=false",
        "checkpoint.keep_rolling=2",
        "checkpoint.asynchronous=false",
        "schedule.kind=constant",
        "schedule.warmup_tokens=3000",
        "optimizer.lr=0.8",
        "anomaly.action=off",
    ]
    assert workers(1).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"
    return folder / "run"


def checkpoints(run):
    return sorted((run / "checkpoints").glob("iter_*"))


def told(tool, *words):
    code, out, err = tool(TOOL, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def copied(run, folder, change=lambda state: None):
    """A run of the same checkpoints, without their tensors; ``change`` is made to each state."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.distcp", "tensorboard"))
    for path in folder.glob("checkpoints/*/trainer_state.json"):
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
    return folder


def test_an_interior_checkpoint_is_chosen_where_the_last_is_dominated(run, checkpoint_tool):
    found = told(checkpoint_tool, run)
    by_step = {one["step"]: one for one in found["candidates"]}
    last, chosen = by_step[max(by_step)], by_step[found["step"]]
    assert min(x["step"] for x in read_state(checkpoints(run)[-1]).gate_history) < found["step"] < last["step"]
    assert last["dominated_by"] == found["step"] and chosen["on_frontier"] and not last["on_frontier"]
    assert all(chosen["changes"][b]["value"] > last["changes"][b]["value"] for b in ("domain", "general"))
    assert found["weights"] == {"domain": 1, "general": 2, "behaviour": 1, "safety": 1}
    assert found["buckets"] == ["domain", "general"]  # drift is a distance, and no loss of behaviour
    j = chosen["changes"]["domain"]["value"] + 2 * min(0, chosen["changes"]["general"]["value"])
    assert chosen["j"]["value"] == pytest.approx(j) and chosen["j"]["low"] < j < chosen["j"]["high"]
    assert [path.name for path in checkpoints(run)] == [f"iter_{step:07d}" for step in sorted(by_step)]


def test_the_best_of_all_looks_is_still_there(run):
    """Rolling ones are removed, two stay: the best is older than these."""
    history = read_state(checkpoints(run)[-1]).gate_history
    assert len(history) > len(checkpoints(run))
    best = choose(history, {look["step"] for look in history}).step
    assert best in [int(path.name.removeprefix("iter_")) for path in checkpoints(run)]


def test_what_a_look_knows_can_be_computed_from_the_items(run):
    """Right answers and held-out text of the general bucket, by hand."""
    look = read_state(checkpoints(run)[0]).gate_history[-1]
    lines = {(x["step"], x["probe"], x["id"]): x for x in read_lines(run / "items.jsonl")}
    now = [x for (step, _, _), x in lines.items() if step == look["step"] and x["bucket"] == "general"]

    def pairs(*probes):
        return [(lines[(0, x["probe"], x["id"])]["score"], x) for x in now if x["probe"] in probes]

    right = pairs("choices", "letters", "lists")
    points = sum(x["score"] - before for before, x in right) / len(right)
    text = [(x["values"]["targets"] * before, -x["values"]["nll"]) for before, x in pairs("general.heldout")]
    fall = 1 - sum(x for _, x in text) / sum(x for x, _ in text)
    bits = [(before, x["score"]) for before, x in pairs("answers")]
    fewer = 1 - sum(x for _, x in bits) / sum(x for x, _ in bits)
    assert look["scores"]["general"]["gain"] == pytest.approx((points + fall + fewer) / 3)
    assert sorted(look["scores"]["general"]["of"].values()) == ["mean", "right", "right", "right", "text"]


def test_the_table_says_why_and_what_to_type(run, checkpoint_tool):
    found = told(checkpoint_tool, run)
    code, out, err = checkpoint_tool(TOOL, run)
    assert (code, err) == (0, "") and "weights: domain 1, general 2" in out and "yes, chosen" in out
    assert f"dominated by {found['step']}" in out and "not measured: behaviour, safety" in out
    assert len(found["reasons"]) == 2 and " ".join(found["reasons"]) in out
    assert f"next: python tools/export_hf.py --checkpoint {found['checkpoint']} --output {run}/export-" in out


def test_the_difference_is_of_the_items_of_both_and_not_told_without_them(run, checkpoint_tool, tmp_path):
    found = told(checkpoint_tool, run)
    j = {one["step"]: one["j"]["value"] for one in found["candidates"]}
    assert found["difference"]["value"] == pytest.approx(j[found["step"]] - j[found["next_best"]])
    assert found["difference"]["low"] < found["difference"]["value"] < found["difference"]["high"]
    assert "on the same items" in found["reasons"][1]
    other = copied(run, tmp_path / "other")
    lines = [x for x in read_lines(run / "items.jsonl") if x["step"] != found["next_best"] or x["probe"] != "answers"]
    (other / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    without = told(checkpoint_tool, other)
    assert without["step"] == found["step"] and without["difference"] is None and "intervals" in without["reasons"][1]
    (other / "items.jsonl").unlink()
    assert told(checkpoint_tool, other)["difference"] is None


def test_the_choice_is_exported_and_a_folder_that_exists_is_refused(run, checkpoint_tool, tmp_path):
    target = tmp_path / "out"
    found = told(checkpoint_tool, run, "--export", target)
    assert found["export"]["output"] == str(target)
    assert model_digest(target) == model_digest(run / "checkpoints" / f"iter_{found['step']:07d}")
    code, out, err = checkpoint_tool(TOOL, run, "--export", target)
    assert code == 2 and not out and str(target) in err and len(err.splitlines()) == 1


def test_other_weights_choose_otherwise_and_only_those_that_are_named(run, checkpoint_tool):
    found = told(checkpoint_tool, run, "--weights", "domain=0,safety=3")
    assert found["weights"] == {"domain": 0, "general": 2, "behaviour": 1, "safety": 3}
    assert max(one["j"]["value"] for one in found["candidates"]) == 0


def test_what_gates_objected_to_is_not_chosen(run, checkpoint_tool, tmp_path):
    chosen = told(checkpoint_tool, run)["step"]

    def object_to(state):
        for look in state["gate_history"]:
            look["action"] = "roll_back" if look["step"] == chosen else look["action"]

    found = told(checkpoint_tool, copied(run, tmp_path / "other", object_to))
    assert found["step"] != chosen
    assert [one["objection"] for one in found["candidates"] if one["step"] == chosen] == [
        "a gate found harm (roll_back)"
    ]


def looked(action):
    """Each look had another action; None: there was none."""

    def change(state):
        state["gate_history"] = [look | {"action": action} for look in state["gate_history"]] if action else []

    return change


def old(state):
    for look in state["gate_history"]:
        del look["scores"], look["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (looked("stop"), "a gate found harm (stop): step "),
        (looked(None), "no look at it"),
        (old, "no items were compared"),
    ],
)
def test_a_run_without_a_choice_is_one_line(run, checkpoint_tool, tmp_path, change, message):
    code, out, err = checkpoint_tool(TOOL, copied(run, tmp_path / "other", change))
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "is no run"),
        ([".."], "is no run"),
        (["empty"], "no iter_* folder"),
        (["empty", "--weights", "domain=1,generl=2"], "--weights"),
        (["empty", "--weights", "domain=-1"], "--weights"),
        (["empty", "--weights", "domain"], "--weights"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(checkpoint_tool, tmp_path, monkeypatch, words, message):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, out, err = checkpoint_tool(TOOL, *words)
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1


def test_an_import_is_no_run(run, checkpoint_tool):
    assert checkpoint_tool(TOOL, run.parent / "import")[0] == 2

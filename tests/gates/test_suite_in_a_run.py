"""A suite at every look of a run: it is written down item by item, and changes nothing of the run."""

import json

import pytest
import torch

from cpt_mega.checkpoint.trainer_state import STATE_FILE, read_state
from cpt_mega.hf.convert import import_hf
from cpt_mega.lineage import COMPLETE, MANIFEST, seal_folder
from cpt_mega.loop.run_folder import read_lines
from tests.helpers.jobsite import checkpoint_tensors, metrics, status
from tests.helpers.models import tiny_llama
from tests.helpers.suites import FILES, SUITE, write_suite
from tests.helpers.workers import JobFailed

ITEMS = {"choices": 7, "letters": 9, "answers": 5, "lists": 8, "pairs": 1, "texts": 4, "drift": 4}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Overrides for a model that has a tokenizer."""
    folder = tmp_path_factory.mktemp("suite_run")
    tiny_llama(folder / "hf", tokenizer=True, num_hidden_layers=2)
    import_hf(folder / "hf", folder / "import")
    intervals = ["eval.interval_tokens=400", "checkpoint.interval_tokens=500", "gates.look_share=null"]
    return [f"model.checkpoint={folder / 'import'}", *intervals]


@pytest.fixture(scope="module")
def plain(workers, jobsite, words, tmp_path_factory):
    run = tmp_path_factory.mktemp("without") / "run"
    workers(2).run("train", config=jobsite.config, overrides=[f"run.dir={run}", *words, "parallel.tp=2"])
    return run


def test_a_run_with_a_suite_is_the_one_without_bit_for_bit_and_has_every_item_of_every_look(
    workers, jobsite, words, plain, tmp_path
):
    run, suite = tmp_path / "run", write_suite(tmp_path)
    words = [f"run.dir={run}", *words, "parallel.tp=2", f"gates.suite={suite}"]
    assert workers(2).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"
    ours, theirs = (checkpoint_tensors(sorted(folder.glob("checkpoints/iter_*"))[-1]) for folder in (run, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        [[line[key] for key in ("step", "tokens", "loss", "grad_norm", "lr")] for line in metrics(folder, "train")]
        for folder in (run, plain)
    )
    assert ours == theirs
    readings = [[x for x in metrics(folder, "eval") if x["probe"].endswith("heldout")] for folder in (run, plain)]
    assert [[x[key] for key in ("step", "bucket", "n")] for x in readings[0]] == [
        [x[key] for key in ("step", "bucket", "n")] for x in readings[1]
    ]
    assert [x["value"] for x in readings[0]] == pytest.approx([x["value"] for x in readings[1]], rel=1e-5)
    looks = sorted({line["step"] for line in metrics(run, "eval")})
    assert looks == sorted({line["step"] for line in metrics(plain, "eval")}) and len(looks) > 3
    lines = [line for line in read_lines(run / "items.jsonl") if line["probe"] in ITEMS]
    for step in looks:
        here = [line for line in lines if line["step"] == step]
        assert {probe: sum(line["probe"] == probe for line in here) for probe in ITEMS} == ITEMS
    (baseline,) = [line for line in read_lines(run / "ledger.jsonl") if line["kind"] == "baseline"]
    assert baseline["digests"].keys() == {*ITEMS, "domain.heldout", "general.heldout"}
    state = read_state(run / "checkpoints" / f"iter_{looks[-1]:07d}")
    alone = {line["bucket"]: line["value"] for line in readings[0] if line["step"] == 0}
    assert state.baseline == pytest.approx(alone)  # a suite's texts do not change a bucket's perplexity
    for probe in ITEMS:
        first = {line["id"]: line["score"] for line in lines if line["probe"] == probe and line["step"] == 0}
        assert state.item_baseline[baseline["digests"][probe]] == first
    assert {(line["probe"], line["metric"]) for line in metrics(run, "eval")} >= {
        ("choices", "acc_norm"),
        ("letters", "acc"),
        ("answers", "bits_per_byte"),
        ("pairs", "largest_leak_nats"),
        ("texts", "perplexity"),
    }
    assert max(line["value"] for line in metrics(run, "eval") if line["metric"] == "largest_leak_nats") == 0.0
    drift = [line["value"] for line in metrics(run, "eval") if (line["probe"], line["metric"]) == ("drift", "kl")]
    assert drift[0] < 1e-6 < drift[1] < drift[-1]  # the reference is kept as fp32
    _set_noise(run / "checkpoints" / f"iter_{looks[-1]:07d}", baseline["digests"]["letters"], 0.5)
    alone = ["train.tokens=0", "schedule.warmup_tokens=0", "restore.mode=weights", f"model.checkpoint={run}"]
    told = [f"run.dir={tmp_path / 'alone'}", *alone, "parallel.tp=2", f"gates.suite={suite}"]
    assert workers(2).run("train", config=jobsite.config, overrides=told)[0][0] == "finished"
    judged = [line["value"] for line in metrics(tmp_path / "alone", "eval") if line["metric"] == "kl"]
    assert judged == [pytest.approx(drift[-1], rel=1e-5)]  # from where that run began
    (rules,) = [line for line in read_lines(tmp_path / "alone" / "ledger.jsonl") if line["kind"] == "gates"]
    assert {gate["name"]: gate["noise"] for gate in rules["item_gates"]} == {"general": 0.5 * 9 / 24, "answers": 0.0}
    (reference,) = (run / "references").iterdir()
    reference.rename(tmp_path / "elsewhere")
    with pytest.raises(JobFailed, match="drift-.*bring it back"):
        workers(2).run("train", config=jobsite.config, overrides=words)
    (tmp_path / "elsewhere").rename(reference)
    assert workers(2).run("train", config=jobsite.config, overrides=words)[0][0] == "finished"


def _set_noise(folder, digest: str, share: float) -> None:
    """As if step 0 of its run had disagreed with itself by so much."""
    state = json.loads((folder / STATE_FILE).read_text())
    assert digest in state["item_noise"]
    state["item_noise"][digest] = share
    for name in (COMPLETE, MANIFEST):
        (folder / name).unlink()
    (folder / STATE_FILE).write_text(json.dumps(state))
    seal_folder(folder)


def test_other_items_of_a_suite_are_refused_until_they_are_accepted_and_get_a_baseline_then(
    workers, jobsite, words, tmp_path
):
    run, suite = tmp_path / "run", write_suite(tmp_path)
    words = [f"run.dir={run}", *words, "train.tokens=300", "schedule.warmup_tokens=0", f"gates.suite={suite}"]
    workers(1).run("train", config=jobsite.config, overrides=words)
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in FILES["answers.jsonl"][1:]))
    with pytest.raises(JobFailed, match="gates.suite answers"):
        workers(1).run("train", config=jobsite.config, overrides=words)
    write_suite(tmp_path, SUITE.replace("name: small", "name: other"))  # which changes no score
    workers(1).run("train", config=jobsite.config, overrides=words)
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in FILES["answers.jsonl"][1:]))
    workers(1).run("train", config=jobsite.config, overrides=[*words, "restore.accept=[gates.suite]"])
    taken = [line["digests"] for line in read_lines(run / "ledger.jsonl") if line["kind"] == "baseline"]
    assert len(taken) == 2 and taken[1].keys() == {"answers"} and taken[1]["answers"] != taken[0]["answers"]


def test_a_bucket_that_gets_other_items_leaves_the_step_0_scores_of_all_other_probes(workers, jobsite, words, tmp_path):
    """Or a drop until then would never be seen."""
    run, suite = tmp_path / "run", write_suite(tmp_path)
    words = [f"run.dir={run}", *words, "train.tokens=300", "schedule.warmup_tokens=0", f"gates.suite={suite}"]
    workers(1).run("train", config=jobsite.config, overrides=words)
    (baseline,) = [line for line in read_lines(run / "ledger.jsonl") if line["kind"] == "baseline"]
    other = f"eval.sets=[{{path: {jobsite.folder}/general.heldout, bucket: general}}]"  # domain is now the suite's
    more = [*words, other, "restore.accept=[eval.sets]"]
    assert workers(1).run("train", config=jobsite.config, overrides=more)[0][0] == "finished"
    _, taken = [line for line in read_lines(run / "ledger.jsonl") if line["kind"] == "baseline"]
    assert set(taken["digests"]) == {"texts"} and taken["perplexity"].keys() == {"domain"}
    state = read_state(sorted((run / "checkpoints").glob("iter_*"))[-1])
    first = {x["id"]: x["score"] for x in read_lines(run / "items.jsonl") if x["probe"] == "letters" and x["step"] == 0}
    assert state.item_baseline[baseline["digests"]["letters"]] == first


@pytest.mark.full
def test_a_checkpoint_is_judged_by_a_suite_alone_and_a_run_that_forks_keeps_its_references(
    workers, jobsite, words, plain, tmp_path
):
    first, suite = tmp_path / "first", write_suite(tmp_path)
    words = [
        *words,
        "eval.sets=[]",
        f"gates.suite={suite}",
        "schedule.warmup_tokens=0",
        "gates.general_perplexity_limit=1",
    ]
    begin = [f"run.dir={first}", *words, "train.tokens=300"]
    assert workers(1).run("train", config=jobsite.config, overrides=begin)[0][0] == "finished"
    end = [x for x in metrics(first, "eval") if x["probe"] == "drift" and x["metric"] == "kl"][-1]["value"]
    alone = [
        f"run.dir={tmp_path / 'alone'}",
        *words,
        "train.tokens=0",
        "restore.mode=weights",
        f"model.checkpoint={first}",
    ]
    assert workers(1).run("train", config=jobsite.config, overrides=alone)[0][0] == "finished"
    judged = [x["value"] for x in metrics(tmp_path / "alone", "eval") if x["probe"] == "drift" and x["metric"] == "kl"]
    assert judged == [pytest.approx(end, rel=1e-5)]
    fork = [f"run.dir={tmp_path / 'fork'}", *words, "restore.mode=full", f"model.checkpoint={first}"]
    for tokens in (600, 900):
        more = [f"train.tokens={tokens}", "restore.accept=[train.tokens]"]
        assert workers(1).run("train", config=jobsite.config, overrides=[*fork, *more])[0][0] == "finished"
        if tokens == 600:
            (first / "references").rename(tmp_path / "gone")


def test_a_suite_that_is_none_is_refused_before_anything_is_made(workers, jobsite, words, tmp_path):
    suite = write_suite(tmp_path, SUITE.replace("kind: lists", "kind: list"))
    with pytest.raises(JobFailed, match="probes.lists"):
        workers(1).run(
            "train", config=jobsite.config, overrides=[f"run.dir={tmp_path / 'run'}", *words, f"gates.suite={suite}"]
        )
    assert not (tmp_path / "run" / "status.json").exists()


@pytest.mark.full
def test_a_rule_that_fails_ends_the_run_with_what_it_has_and_a_mended_one_judges_first(
    workers, jobsite, words, tmp_path
):
    """On all ranks; what was trained up to there is saved."""
    run, rules = tmp_path / "run", tmp_path / "own.py"
    text = "rules: {functions: ['own.py:rule'], gain: null}\n"
    suite = write_suite(tmp_path, SUITE + text)
    told = [f"run.dir={run}", *words, "parallel.tp=2", f"gates.suite={suite}", "eval.sets=[]"]
    told += ["eval.interval_tokens=500", "eval.dense_start=false"]
    rules.write_text("def rule(look, history):\n    return history[1]['nothing'] if history else None\n")
    state, reason = workers(2).run("train", config=jobsite.config, overrides=told)[0]
    assert state == "config_error" and "rules.functions" in reason and "own.py" in reason
    (checkpoint,) = [x for x in sorted((run / "checkpoints").glob("iter_*")) if read_state(x).look_pending]
    assert status(run)["exit_code"] == 2 and read_state(checkpoint).step == status(run)["step"] > 2
    rules.write_text("def rule(look, history):\n    return ('warn', 'mended') if history else None\n")
    workers(2).stop()  # a file is imported once by a process
    assert workers(2).run("train", config=jobsite.config, overrides=told)[0][0] == "finished"
    judged = [line["step"] for line in read_lines(run / "ledger.jsonl") if line["kind"] == "verdict"]
    assert int(checkpoint.name.removeprefix("iter_")) in judged

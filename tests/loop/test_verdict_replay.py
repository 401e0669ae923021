"""Decisions come out as they were taken: over a start on other items, one in another folder, and with rules in Python."""

import json
import math
import shutil

import pytest

from cpt_mega.errors import InputError
from cpt_mega.gates.probes.perplexity import perplexity_of
from cpt_mega.gates.rules import GainGate, Judge
from cpt_mega.gates.verdict import LookScores, outcome
from cpt_mega.hf.convert import import_hf
from cpt_mega.loop.run_folder import read_lines
from cpt_mega.loop.verdict_replay import take_again
from tests.helpers.models import tiny_llama
from tests.helpers.suites import write_suite

pytestmark = pytest.mark.full  # what every commit shows of it is in test_verdict_actions.py
SUITE = """\
name: small
row_tokens: 64
probes:
  lists: {bucket: general, kind: lists, count: 8, shots: 2}
rules:
  alpha: 0.05
  general: null
  gain: {threshold: 0.5, patience: 50, action: warn}
  functions: [FUNCTION]
"""
TELLS = """
import json

def tells(look, history):
    return "warn", json.dumps([history, look.baseline, look.before], sort_keys=True)
"""


@pytest.fixture(scope="module")
def runs(workers, jobsite, tmp_path_factory):
    """``first``: three starts, the second on fewer items, the third of the checkpoint that the second began from; ``second``
    goes on from its last checkpoint."""
    folder = tmp_path_factory.mktemp("replayed")
    tiny_llama(folder / "hf", tokenizer=True, num_hidden_layers=1)
    import_hf(folder / "hf", folder / "import")
    (folder / "own.py").write_text(TELLS)
    suite = write_suite(folder, SUITE.replace("FUNCTION", f"{folder / 'own.py'}:tells"))
    words = [f"gates.suite={suite}", "eval.interval_tokens=150", "eval.dense_start=false", "schedule.warmup_tokens=0"]
    words += ["optimizer.lr=1e-6", "gates.look_share=null", "gates.max_overlap=null", "checkpoint.interval_tokens=150"]

    def train(run: str, tokens: int, *more: str) -> None:
        told = [f"run.dir={folder / run}", f"model.checkpoint={folder / 'import'}", f"train.tokens={tokens}"]
        told += [*words, *more]
        assert workers(1).run("train", config=jobsite.config, overrides=told)[0][0] == "finished"

    accept = "restore.accept=[eval.sets,eval.max_tokens,train.tokens,schedule,eval,gates]"
    train("first", 400)
    kept = {path.name for path in (folder / "first" / "checkpoints").glob("iter_*")}
    train("first", 700, "eval.max_tokens=200", accept)
    for path in (folder / "first" / "checkpoints").glob("iter_*"):
        if path.name not in kept:  # as if it had been killed before it saved anything
            shutil.rmtree(path)
    train("first", 700, accept)
    train("second", 1000, f"model.checkpoint={folder / 'first'}", "restore.mode=full", "eval.max_tokens=200", accept)
    return folder


def copied(runs, run: str, to) -> None:
    for name in ("ledger.jsonl", "items.jsonl"):
        shutil.copy(runs / run / name, to / name)


@pytest.mark.parametrize("run", ["first", "second"])
def test_a_start_on_other_items_forgets_in_the_replay_what_the_run_forgot(runs, run):
    """The function tells all that rules see, so the looks before are the same too."""
    found = take_again(runs / run)
    assert len(found) >= 2 and [one.difference for one in found] == [None] * len(found)
    history, baseline, _ = json.loads(found[-1].line["verdicts"][-1]["reason"])
    assert all(set(look) == {"step", "tokens", "perplexity", "action", "objections"} for look in history)
    assert baseline.keys() == {"domain", "general"}
    known = [line["known"] for line in read_lines(runs / run / "ledger.jsonl") if line["kind"] == "restore"]
    had = [
        [sorted(start["baseline"]), {bucket for look in start["looks"] for bucket in look["perplexity"]}]
        for start in known
    ]
    both = [["domain", "general"], {"domain", "general"}]
    assert had == ([[[], set()], [[], set()], both] if run == "first" else [[[], set()]])


def test_a_function_that_cannot_be_asked_any_more_is_told_of_at_its_looks(runs, tmp_path):
    copied(runs, "first", tmp_path)
    ledger = (tmp_path / "ledger.jsonl").read_text()
    (tmp_path / "ledger.jsonl").write_text(ledger.replace(f"{runs / 'own.py'}:tells", f"{tmp_path / 'gone.py'}:tells"))
    found = take_again(tmp_path)
    assert len(found) == len(take_again(runs / "first"))
    assert all("gone.py" in one.difference for one in found)
    late = "def tells(look, history):\n    assert look.step < {step}\n    return 'warn', 'x'"
    (tmp_path / "gone.py").write_text(late.format(step=found[-1].line["step"]))
    again = [one.difference for one in take_again(tmp_path)]
    assert "AssertionError" in again[-1] and "the ledger says" in again[0] and "is not what it was then" in again[0]


def test_a_checkpoint_that_is_gone_and_has_what_a_run_was_judged_by_is_asked_for(runs, tmp_path):
    copied(runs, "second", tmp_path)
    (start,) = [line["from"] for line in read_lines(tmp_path / "ledger.jsonl") if line["kind"] == "restore"]
    ledger = (tmp_path / "ledger.jsonl").read_text()
    (tmp_path / "ledger.jsonl").write_text(ledger.replace(start, f"{tmp_path}/moved/iter_0000001"))
    with pytest.raises(InputError, match=r"moved/iter_0000001.*bring it back"):
        take_again(tmp_path)


def test_a_perplexity_that_was_infinite_is_so_again(tmp_path):
    """JSON holds none, and a fall from it is large, where one from NaN would be no fall."""
    gain = GainGate(threshold=0.0, price=1.0, patience=1, action="stop", from_tokens=0, budget_tokens=1000)
    judge, before = Judge(gain=gain), {"step": 1, "tokens": 100, "action": "continue", "objections": {}}
    now, values = {"domain": perplexity_of(20.0, 10)}, {"nll": 20.0, "targets": 10.0}
    look = LookScores(2, 200, {"domain": 20.0}, now, {"held": {}}, {"held": {"0": -2.0}})
    said = judge.verdicts(look, [before | {"perplexity": {"domain": math.inf}}])
    assert [verdict.action for verdict in said] == ["continue", "continue"]
    item = {"probe": "held", "digest": "d", "bucket": "domain", "id": "0", "score": -2.0, "values": values}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    known = {"baseline": look.baseline, "baseline_tokens": {}, "item_baselines": []}
    known["looks"] = [before | {"perplexity": {"domain": None}}]
    rules = {"digests": {"held": "d"}, "perplexity_probes": {"held": "domain"}, "function_files": {}}
    told = {"perplexity": now, "action": outcome(said)["action"], "verdicts": [one.to_json() for one in said]}
    lines = [
        {"kind": "restore", "from": "", "known": known},
        {"kind": "gates", **judge.to_json(), **rules},
        {"kind": "verdict", "step": 2, "tokens": 200, "items": [0, 10**6], **told},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [one.difference for one in take_again(tmp_path)] == [None]

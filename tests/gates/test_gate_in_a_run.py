"""The first gate inside real runs: held-out perplexity against transformers, and a stop with its own state."""

import json
import math

import pytest
import torch

from cpt_mega.data.indexed import IndexedCorpus
from tests.helpers.jobsite import metrics, status
from tests.helpers.workers import JobFailed

LAYOUTS = {
    "one": (1, []),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
}


def _run(workers, jobsite, run, world, *overrides):
    return workers(world).run("train", config=jobsite.config, overrides=[f"run.dir={run}", *overrides])[0]


def _reference(jobsite, prefix, max_tokens: int, seq_length: int) -> tuple[float, int]:
    """Perplexity by transformers: documents in order; of those longer than a row, each token behind the last half of a row or
    more."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(jobsite.hf, dtype=torch.float32).eval()
    corpus = IndexedCorpus(str(prefix))
    nll, targets, used, longest = 0.0, 0, 0, 0
    for document, length in enumerate(corpus.document_lengths.tolist()):
        ids = torch.from_numpy(corpus.read(document, 0, min(length, max_tokens - used)))
        for start in range(0, max(1, len(ids) - 1 - seq_length // 2), seq_length // 2):
            window = ids[start : start + seq_length + 1]
            with torch.no_grad():
                logprobs = model(window[None, :-1]).logits[0].float().log_softmax(-1)
            new = logprobs.gather(1, window[1:, None])[seq_length // 2 if start else 0 :]
            nll, targets = nll - new.sum().item(), targets + len(new)
        used, longest = used + len(ids), max(longest, len(ids))
        if used >= max_tokens:
            break
    assert longest > seq_length + 1  # or no window would move
    return math.exp(nll / targets), targets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_zero_perplexity_is_transformers(workers, jobsite, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    assert (
        _run(workers, jobsite, tmp_path / "run", world, "train.tokens=0", "schedule.warmup_tokens=0", *overrides)[0]
        == "finished"
    )
    readings = {line["bucket"]: line for line in metrics(tmp_path / "run", "eval")}
    for bucket in ("domain", "general"):
        value, targets = _reference(jobsite, jobsite.folder / f"{bucket}.heldout", 320, 32)
        assert readings[bucket]["n"] == targets
        assert readings[bucket]["value"] == pytest.approx(value, rel=1e-5)
        assert readings[bucket]["step"] == 0


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2_sp", marks=pytest.mark.full)])
def test_a_general_perplexity_above_its_limit_stops_the_run(workers, jobsite, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    only_domain = f"data.sources=[{{name: domain, path: {jobsite.folder}/domain, role: domain}}]"
    words = [
        only_domain,
        "optimizer.lr=1.0",
        "eval.interval_tokens=500",
        "gates.general_perplexity_limit=0.15",
        *overrides,
    ]
    state, reason = _run(workers, jobsite, tmp_path / "run", world, "train.tokens=5000", *words)
    assert state == "gate_stop" and "general perplexity" in reason
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("gate_stop", 80, reason)
    assert 500 <= ended["tokens"] < 5000
    verdicts = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    (verdict,) = verdicts[-1]["verdicts"]
    assert verdicts[-1]["action"] == verdict["action"] == "stop" and verdict["numbers"]["rise"] > 0.15
    assert (tmp_path / "run" / "checkpoints" / f"iter_{ended['step']:07d}" / "COMPLETE").is_file()


def test_the_same_run_within_its_limit_goes_on(workers, jobsite, tmp_path):
    state, _ = _run(workers, jobsite, tmp_path / "run", 1, "optimizer.lr=1e-6", "gates.general_perplexity_limit=0.15")
    assert state == "finished"
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["action"] for line in ledger if line["kind"] == "verdict"] == ["continue"]


def test_a_stopped_run_is_judged_again_before_it_goes_on(workers, jobsite, tmp_path):
    """The same command may not creep past a verdict step by step; a raised limit lets it go on."""
    run = tmp_path / "run"
    words = ["optimizer.lr=1.0", "eval.interval_tokens=250", "train.tokens=2000"]
    limit = "gates.general_perplexity_limit"
    assert _run(workers, jobsite, run, 1, *words, f"{limit}=0.01")[0] == "gate_stop"
    stopped = status(run)["step"]
    assert _run(workers, jobsite, run, 1, *words, f"{limit}=0.01")[0] == "gate_stop"
    assert status(run)["step"] == stopped == len(metrics(run, "train"))
    assert _run(workers, jobsite, run, 1, *words, f"{limit}=1e9")[0] == "finished"
    assert status(run)["step"] > stopped


def test_other_items_under_the_same_path_are_refused(workers, jobsite, tmp_path):
    """A baseline is worth something only on the items it was measured on."""
    for name in ("bin", "idx"):
        (tmp_path / f"held.{name}").write_bytes((jobsite.folder / f"general.heldout.{name}").read_bytes())
    run = tmp_path / "run"
    words = [f"eval.sets=[{{path: {tmp_path}/held, bucket: general}}]", "gates.general_perplexity_limit=0.9"]
    _run(workers, jobsite, run, 1, *words)
    before = metrics(run, "eval")[0]["value"]
    for name in ("bin", "idx"):
        (tmp_path / f"held.{name}").write_bytes((jobsite.folder / f"domain.heldout.{name}").read_bytes())
    with pytest.raises(JobFailed, match="eval.sets general"):
        _run(workers, jobsite, run, 1, *words)
    assert _run(workers, jobsite, run, 1, *words, "restore.accept=[eval.sets]")[0] == "finished"
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    baselines = [line["perplexity"]["general"] for line in ledger if line["kind"] == "baseline"]
    assert baselines[0] == before and len(baselines) == 2 and baselines[1] != before


def test_a_checkpoint_is_judged_alone_by_its_runs_step_zero(workers, jobsite, tmp_path):
    """Nothing is trained or saved; 80 when a gate objects. On an import there is nothing to judge by."""
    words = ["train.tokens=1500", "optimizer.lr=1.0", "gates.general_perplexity_limit=null"]
    assert _run(workers, jobsite, tmp_path / "run", 1, *words)[0] == "finished"
    base, end = (metrics(tmp_path / "run", "eval")[at]["value"] for at in (1, -1))
    assert end > 1.2 * base
    only = [
        "train.tokens=0",
        "schedule.warmup_tokens=0",
        "restore.mode=weights",
        f"model.checkpoint={tmp_path / 'run'}",
    ]
    for limit, ends in ((0.15, "gate_stop"), (end / base, "finished")):
        state, _ = _run(
            workers, jobsite, tmp_path / ends, 2, *only, "parallel.tp=2", f"gates.general_perplexity_limit={limit}"
        )
        assert state == ends and not (tmp_path / ends / "checkpoints").exists()
        assert metrics(tmp_path / ends, "eval")[-1]["value"] == pytest.approx(end, rel=1e-5)
    assert status(tmp_path / "gate_stop")["exit_code"] == 80
    assert status(tmp_path / "finished")["next_command"].startswith("tail -n 5")
    assert (
        _run(workers, jobsite, tmp_path / "import", 1, *only[:-1], "gates.general_perplexity_limit=0.15")[0]
        == "finished"
    )

"""The benchmarks' own arithmetic and promises; what they measure is in tools/bench/RESULTS.md."""

import ast
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cpt_mega.data.best_fit import best_fit_rows

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
ALLOWED = ("torch", "megatron.core", "cpt_mega.engine.host", "cpt_mega.engine.backend", "cpt_mega.engine.layers")


@pytest.fixture
def load(monkeypatch):
    """Imports a script as the scripts beside it do."""
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_the_bare_loop_is_bare():
    text = (BENCH / "bare_core.py").read_text()
    assert len(text.splitlines()) < 120
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            allowed = name.split(".")[0] in sys.stdlib_module_names or any(
                name == room or name.startswith(f"{room}.") for room in ALLOWED
            )
            assert allowed, name


def test_ratios_are_of_speed_and_within_a_round(load):
    bench = load("step_overhead")
    # the machine is twice as slow in the second round, for both; one step of the first is an outlier
    rounds = [
        {bench.TRAINER_1.title: [400.0, 500.0, 9000.0], bench.BARE_1.title: [400.0, 400.0, 500.0]},
        {bench.TRAINER_1.title: [800.0], bench.BARE_1.title: [800.0]},
    ]
    speeds, ratios = bench.summarise(rounds)
    assert speeds == {
        bench.TRAINER_1.title: bench.Spread(650.0, 500.0, 800.0),
        bench.BARE_1.title: bench.Spread(600.0, 400.0, 800.0),
    }
    assert ratios == {(bench.TRAINER_1.title, bench.BARE_1.title): bench.Spread(pytest.approx(0.9), 0.8, 1.0)}


def test_first_losses_are_held_against_the_trainers(load):
    bench = load("step_overhead")
    reports = {
        bench.TRAINER_1.title: {"first_loss": 8.0},
        bench.BARE_1.title: {"first_loss": 7.5},
        bench.TRANSFORMERS.title: {"first_loss": None},
    }
    assert bench.loss_differences(reports) == {bench.BARE_1.title: 0.5}


def test_the_textbook_packs_as_we_do(load):
    """What the packing benchmark is measured against does the same work."""
    sizes = np.sort(np.random.default_rng(0).integers(1, 400, 3000))[::-1]
    assert load("packing_plans").textbook(sizes.tolist(), 400) == best_fit_rows(sizes.astype(np.int32), 400).max() + 1


def test_model_flops_by_hand(load):
    mfu = load("mfu")
    sizes = mfu.Sizes(layers=2, hidden=8, ffn=16, heads=2, kv_heads=1, head_dim=4, vocab=10)
    # a layer: query and output 8 x 8, key and value 8 x 4, three matrices of 8 x 16
    assert sizes.layer_weights == 2 * (64 + 64 + 32 + 32 + 3 * 128)
    # 6 x 1152, the output layer 6 x 8 x 10, scores 6 x 2 layers x 8 x attended
    assert mfu.flops_per_token(sizes, [4]) == 6912 + 480 + 384
    assert mfu.flops_per_token(sizes, [1, 3]) == 6912 + 480 + 240  # attended: (1 + 9) / 4
    assert mfu.mfu(sizes, [4], 989e12 / 7776 / 2, "bf16") == pytest.approx(0.5)
    assert mfu.mfu(sizes, [4], 1979e12 / 7776 / 4, "fp8-tensorwise") == pytest.approx(0.25)


@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, "step_overhead.py"],
        [sys.executable, "contenders.py"],
        [sys.executable, "packing_plans.py"],
        [sys.executable, "packing_training.py"],
        [sys.executable, "stream.py"],
        [sys.executable, "faults.py"],
        [sys.executable, "gpu/report.py"],
        [sys.executable, "gpu/section.py"],
        ["bash", "gpu/run.sh"],
    ],
    ids=lambda words: words[1],
)
def test_help(words):
    done = subprocess.run([words[0], str(BENCH / words[1]), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_run_killed_in_a_save_ends_as_the_one_that_nothing_happened_to(load, jobsite, workers, tmp_path):
    """A fault of the campaign in one process: the real command, all of it killed, and the same command again.

    The other run is made by processes that other tests need as well: it takes what two starts take.
    """
    sites, launches, injections = map(load, ("fault_site", "fault_launch", "fault_injections"))
    site = sites.Site(tmp_path)
    site.config.write_text(Path(jobsite.config).read_text() + "checkpoint: {rolling_interval_tokens: 200}\n")
    workers(1).run("train", config=str(site.config), overrides=[f"run.dir={site.reference}"])
    left = []

    def in_a_later_save(launch, draw, times):
        return launches.waited(launch, lambda: launches.newest_complete(launch.run) and launch.is_saving())

    def kill_all(launch, draw, hits):
        code = injections.kill_all(launch, draw, hits)
        left.append((launches.newest_complete(launch.run), len(launches.unfinished(launch.run))))
        return code

    hits = injections.Hits("kill all in a save")
    fault = injections.TrainerFault(kill_all, in_a_later_save)
    fault(site, hits, 1, random.Random(1), (0.0, 0.0), Console(quiet=True))
    assert not hits.problems and (hits.survived, hits.codes) == (1, {"-9": 1})
    ((kept, begun),) = left
    assert kept and begun == 1  # the second save or a later one, which did not come to its end
    assert launches.restores(site.folder / "runs" / "kill_all_in_a_save.0") == [0, kept]


def _campaign(folder: Path, *faults: str) -> list[dict]:
    """What one injection of each of some faults comes to, in two processes and with a small corpus."""
    words = ["--injections", "1", "--tokens", "1500", "--documents", "2000", "--folder", str(folder / "site")]
    words += ["--output", "found.json", *(word for name in faults for word in ("--only", name))]
    command = [sys.executable, str(BENCH / "faults.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())["faults"]


@pytest.mark.full
def test_the_campaign_of_faults_in_short(tmp_path):
    """All killed inside a save, and an import too: they end as those that nothing happened to."""
    found = _campaign(tmp_path, "kill all in a save", "kill import_hf")
    assert [(one["injections"], one["survived"], one["codes"]) for one in found] == [(1, 1, {"-9": 1})] * 2


@pytest.mark.full
def test_one_rank_that_torchrun_replaces(tmp_path):
    (found,) = _campaign(tmp_path, "kill one rank, restarted by torchrun")
    assert (found["survived"], found["codes"]) == (1, {"0": 1})


def test_a_run_that_lost_a_step_did_not_survive(load, tmp_path):
    """What the campaign compares can fail."""
    launches = load("fault_launch")
    for name, steps in (("reference", [1, 2]), ("run", [1])):
        (tmp_path / name).mkdir()
        lines = [{"kind": "train", "step": step, "loss": 1.0, "tokens": step} for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("last one is 1" in problem for problem in launches.differences(tmp_path / "reference", tmp_path / "run"))
    assert launches.byte_differences(tmp_path / "reference", tmp_path / "run") == ["metrics.jsonl differs"]


def test_a_section_that_breaks_is_in_the_report(load, tmp_path):
    report = load("report")
    failing = {"title": "T", "columns": ["a|b"], "rows": [["x"]], "failed": ["too far"], "notes": ["one\ntwo"]}
    sections = {
        "layers": {**failing, "state": "failed", "seconds": 1.0, "about": {"device": "D"}},
        "packing": {"title": "P", "error": "Traceback: boom", "state": "failed", "seconds": 2.0},
        "syncs": {"title": "S", "failed": [], "skipped": "needs CUDA", "state": "skipped", "seconds": 3.0},
    }
    report.write({"started": "now", "commit": "c", "smoke_cpu": True, "sections": sections}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "device D",
        "a\\|b",
        "**failed**: too far",
        "Traceback: boom",
        "needs CUDA",
        "Smoke test",
        "one\ntwo",
    ):
        assert words in text
    assert (tmp_path / "report.json").is_file()

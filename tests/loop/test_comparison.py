"""Where two runs of the trainer part: in the rows, the metrics, the weights; nothing is called equal that is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cpt_mega.checkpoint import comparison
from cpt_mega.checkpoint.comparison import compare_checkpoints
from cpt_mega.errors import InputError
from cpt_mega.lineage import seal_folder
from cpt_mega.loop.comparison import compare_runs
from tests.helpers.jobsite import checkpoint_tensors, metrics

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"
WORDS = ["train.tokens=700", "checkpoint.interval_tokens=1"]
MOMENT = "optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def site(jobsite, workers, tmp_path_factory):
    """``site(name, *overrides, world, stops)``: a run, made once; its first ``stops`` steps are without the overrides."""
    root = tmp_path_factory.mktemp("compared")

    def run(name, *overrides, world=1, stops=0):
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            for _ in range(stops):
                (folder / "STOP").touch()
                workers(world).run("train", config=jobsite.config, overrides=[f"run.dir={folder}", *WORDS])
            words = [f"run.dir={folder}", *WORDS, *overrides]
            workers(world).run("train", config=jobsite.config, overrides=words)
        return folder

    return run


@pytest.fixture
def copied(site, tmp_path):
    """A copy of the run ``through`` to be damaged."""
    return Path(shutil.copytree(site("through"), tmp_path / "copied"))


def checkpoint(run, step):
    return run / "checkpoints" / f"iter_{step:07d}"


def rewrite_metrics(run, change):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def write_tensors(folder, tensors, state):
    """A sealed checkpoint of tensors and a trainer's state."""
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "trainer_state.json").write_text(state)
    seal_folder(folder)
    return folder


def test_a_run_is_equal_to_one_that_was_stopped_and_to_itself(site):
    through, stopped = site("through"), site("stopped", stops=2)
    found = compare_runs(through, stopped)
    assert found.first is None and found.is_exact
    steps = len(metrics(through, "train"))
    assert steps >= 3 and (found.data.by, found.data.steps) == ("rows", steps)
    assert (found.metrics.common, found.metrics.equal) == (steps, steps)
    assert [one.step for one in found.weights.checkpoints] == list(range(1, steps + 1))
    assert all(one.tensors == 36 and one.differing == 0 for one in found.weights.checkpoints)
    looks = len({line["step"] for line in metrics(through, "eval")})
    assert found.readings.equal == found.readings.common == looks > 2 and not found.config
    assert compare_runs(through, site("again")).data.by == "ledger"


def test_another_seed_parts_the_data_at_the_first_step(site):
    found = compare_runs(site("through"), site("seed", "train.seed=7"))
    assert (found.first.step, found.first.area, found.first.what) == (1, "data", "rows")
    assert [(one.field, one.a, one.b) for one in found.data.entries] == [("seed", 1234, 7)]
    row = found.data.rows[0]
    assert row.a != row.b and row.a["documents"] and [one.field for one in found.config] == ["train.seed"]
    assert found.metrics.first_step == 1 and found.weights.first.step == 1
    assert any(one.field.startswith("stream.sources.") for one in found.weights.first.state)


def test_rows_part_where_the_order_was_changed(site):
    found = compare_runs(site("through"), site("reseeded", "train.seed=7", "restore.accept=[train.seed]", stops=1))
    assert (found.first.step, found.first.area, found.data.steps) == (2, "data", 2)
    assert found.weights.checkpoints[0].differing == 0 and found.weights.first.step == 2


def test_another_rate_parts_metrics_and_weights_where_it_was_changed(site):
    rate = ("optimizer.lr=2e-2", "restore.accept=[optimizer.lr]")
    found = compare_runs(site("through"), site("rate", *rate, stops=1))
    assert (found.first.step, found.first.area, found.first.what) == (2, "metrics", "lr")
    assert found.first.text.endswith("relative 0.5")
    assert found.data.first_step is None and found.metrics.equal == 1
    first = found.weights.first
    assert (first.step, first.first.key) == (2, "embedding.word_embeddings.weight")
    assert 0 < first.differing < first.tensors  # the moments are of the same gradients yet
    assert [one.field for one in found.config] == ["optimizer.lr"]
    steps = len(metrics(site("through"), "train"))
    later = ", ".join(map(str, range(3, steps + 1)))
    assert f"weights: checkpoints after the first that differs: steps {later}" in found.not_compared


@pytest.mark.full
def test_layouts_agree_within_a_tolerance_and_no_further(site):
    through, tp2 = site("through"), site("tp2", "parallel.tp=2", "parallel.sp=true", world=2)
    found = compare_runs(through, tp2, 1e-3)
    assert found.first is None and not found.is_exact
    worst = max(one.largest_relative for one in found.weights.checkpoints)
    assert 0 < worst < 1e-3 and found.metrics.within > 0
    assert found.data.by == "ledger" and [one.field for one in found.config] == ["parallel.sp", "parallel.tp"]
    assert compare_runs(through, tp2, worst / 2).weights.first is not None
    assert compare_runs(through, tp2).first.area == "readings"  # of step 0, before anything was trained


def test_one_flipped_value_of_one_moment_is_found(site, copied):
    folder = checkpoint(copied, 2)
    tensors, state = checkpoint_tensors(folder), (folder / "trainer_state.json").read_text()
    tensors[MOMENT][3, 5, 7] += 0.25
    write_tensors(folder, tensors, state)
    found = compare_runs(site("through"), copied)
    assert (found.first.step, found.first.area, found.first.what) == (2, "weights", MOMENT)
    pair = found.weights.first
    assert (pair.differing, pair.differing_elements) == (1, 1) and pair.first.at == [3, 5, 7]
    assert pair.first.b - pair.first.a == pytest.approx(0.25) == pair.first.absolute
    done = subprocess.run(
        [sys.executable, str(TOOL), site("through"), copied], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and f"first difference: {MOMENT} (weights) in the checkpoint of step 2" in done.stdout
    assert f"next: python tools/inspect_data.py --run {site('through')} --step 2" in done.stdout


def test_lines_of_the_metrics(site, copied):
    def change(lines):
        for line in lines:
            wrong = {**line, "loss": 100.0}
            if line["kind"] == "train" and line["step"] == 2:
                yield wrong  # and done again by a run that went on
            if line["kind"] == "train" and line["step"] == 3:
                line = {**line, "loss": line["loss"] * (1 + 1e-9), "grad_norm": float("nan"), "data_wait_s": 1e9}
            yield line

    rewrite_metrics(copied, change)
    found = compare_runs(site("through"), copied)
    assert (found.first.step, found.first.what, found.metrics.repeated) == (3, "loss", (0, 1))
    assert [one.field for one in found.metrics.first] == ["loss", "grad_norm"]
    assert found.metrics.largest_step == 3 and found.metrics.largest.relative == pytest.approx(1e-9)
    assert [one.field for one in compare_runs(site("through"), copied, 1e-6).metrics.first] == ["grad_norm"]
    assert compare_runs(copied, copied).first is None  # NaN equals NaN


def test_what_cannot_be_compared_is_named(site, copied):
    (checkpoint(copied, 1) / "COMPLETE").unlink()
    (checkpoint(copied, 2) / "__0_0.distcp").write_bytes(b"")
    found = compare_runs(site("through"), copied)
    assert found.first is None
    assert [one.step for one in found.weights.checkpoints] == [3, *range(4, len(metrics(copied, "train")) + 1)]
    assert "weights: iter_0000001 of B is not complete" in found.not_compared
    assert "weights: checkpoints that only A has: steps 1" in found.not_compared
    assert any(sentence.startswith("weights: the checkpoints of step 2 (") for sentence in found.not_compared)


def test_without_corpora_the_ledgers_are_compared(site, tmp_path):
    seed = Path(shutil.copytree(site("seed", "train.seed=7"), tmp_path / "seed"))
    ledger = seed / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('/domain"', '/gone"'))
    found = compare_runs(site("through"), seed)
    assert (found.first.step, found.first.area, found.first.what) == (1, "data", "entry of the ledger")
    assert found.first.text.startswith("seed 1234 in A, 7 in B") and any(
        "cannot be drawn again" in sentence for sentence in found.not_compared
    )


def test_nothing_in_common_is_not_equal(site, copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "ledger.jsonl").unlink()
    rewrite_metrics(copied, lambda lines: [{**line, "step": line["step"] + 100} for line in lines])
    with pytest.raises(InputError, match="nothing in it can be compared"):
        compare_runs(site("through"), copied)


def test_tensors_of_any_kind(site, tmp_path, monkeypatch):
    """Weights that only one has, other shapes, other dtypes, values that are no numbers."""
    monkeypatch.setattr(comparison, "_PIECE", 2)  # elements at a time: large tensors are taken in pieces
    state = (checkpoint(site("through"), 1) / "trainer_state.json").read_text()
    nan, inf = float("nan"), float("inf")
    tensors = {
        "embedding.weight": torch.tensor([nan, inf, -0.0, 1.0]),
        "decoder.layers.w": torch.arange(24.0).reshape(2, 3, 4),
        "decoder.final_layernorm.weight": torch.ones(2),
        "output_layer.weight": torch.ones(3, 2),
        "optimizer.step": torch.tensor(5),
    }
    other = {
        "embedding.weight": torch.tensor([nan, inf, 0.0, 1.0]),
        "decoder.layers.w": torch.arange(24.0).reshape(2, 3, 4).bfloat16(),
        "decoder.final_layernorm.weight": torch.ones(3),
        "output_layer.weight": torch.tensor([[1.0, 1.0], [1.0, nan], [1.0, 1.0]]),
        "optimizer.step": torch.tensor(6),
        "decoder.layers.more": torch.ones(1),
        "optimizer.state.exp_avg.decoder.layers.w": torch.ones(1),
    }
    a, b = write_tensors(tmp_path / "a", tensors, state), write_tensors(tmp_path / "b", other, state)
    found = compare_checkpoints(a, b)
    assert (found.tensors, found.differing, found.first.key) == (5, 4, "decoder.layers.w")
    assert found.dtypes == [("decoder.layers.w", "float32", "bfloat16")] and found.first.absolute == 0
    assert found.weights_only_in == ([], ["decoder.layers.more"])
    assert found.optimizer_only_in == ([], ["optimizer.state.exp_avg.decoder.layers.w"])
    assert found.not_compared == [
        "1 tensors of the optimizer that A has not, as optimizer.state.exp_avg.decoder.layers.w"
    ]
    close = compare_checkpoints(a, b, 0.1)
    assert close.first.key == "decoder.final_layernorm.weight" and close.first.shapes == ([2], [3])
    tensors["decoder.final_layernorm.weight"] = torch.ones(3)
    close = compare_checkpoints(write_tensors(tmp_path / "a", tensors, state), b, 0.1)
    assert (close.first.key, close.first.at, close.first.absolute) == ("output_layer.weight", [1, 1], inf)
    assert close.largest_relative == inf

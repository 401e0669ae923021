"""A gate over fixed items alarms seldom at half of its threshold and finds twice of it: in short, with fixed seeds."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cpt_mega.gates.paired import gate_items

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
TAU, LOOKS = 0.08, 50


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gate_simulation")


def recorded(bench, tmp_path, items: int = 1_500):
    """Looks of items of the latent model, with a drop of their own, in a file."""
    before, courses = bench.Latent().draw(np.random.default_rng(5), 1, items, 0.03, 4)
    lines = [
        {"probe": "p", "id": str(item), "step": 100 * look, "score": float(right)}
        for look, column in enumerate([before, *courses])
        for item, right in enumerate(column[0])
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return bench.Recorded.read(path)


@pytest.mark.parametrize("kind", ["latent", "recorded"])
def test_items_drop_flip_and_stay_alike_as_they_are_told_to(bench, tmp_path, kind):
    items = bench.Latent(0.6, 0.1, 0.8) if kind == "latent" else recorded(bench, tmp_path)
    for drop in (0.0, 0.05):
        before, courses = items.draw(np.random.default_rng(1), 100, 2_000, drop, 6)
        looks = list(courses)
        assert len(looks) == 6
        for now in looks:
            assert before.mean() - now.mean() == pytest.approx(drop, abs=0.004)
            assert (before != now).mean() <= items.discordant_at(drop) + 0.004
        assert max((before != now).mean() for now in looks) == pytest.approx(items.discordant_at(drop), abs=0.004)
        assert 0 < (looks[0] != looks[1]).mean() < 0.8 * (before != looks[0]).mean()  # looks are correlated


def test_the_gate_alarms_in_5_percent_of_runs_at_most_and_finds_95_percent_of_drops(bench):
    items = bench.Latent()
    n = gate_items(TAU, items.discordant_at(2 * TAU), bench.ALPHA, LOOKS)
    runs = bench.simulate(items, n, TAU / 2, TAU, LOOKS, 60, 1, judged=LOOKS)
    starts = bench.simulate(items, n, 2 * TAU, TAU, LOOKS, 400, 2, judged=2)
    alarms, found = runs[bench.PACKAGE].any(axis=1), starts[bench.PACKAGE].any(axis=1)
    assert not bench.missed(alarms, found) and alarms.mean() <= 0.05 and found.mean() >= 0.95
    # what would not do
    for rule in ("estimate above tau", "McNemar at alpha", "margin at alpha"):
        alarms, found = runs[rule].any(axis=1), starts[rule].any(axis=1)
        assert bench.missed(alarms, found) and alarms.mean() > 0.2 and found.mean() > 0.95, rule
    rule = "main at alpha / looks, reserve at alpha"
    assert bench.missed(runs[rule].any(axis=1), starts[rule].any(axis=1))


def test_it_holds_for_real_items_that_are_resampled(bench, tmp_path):
    items = recorded(bench, tmp_path)
    n = gate_items(TAU, items.discordant_at(2 * TAU), bench.ALPHA, LOOKS)
    runs = bench.simulate(items, n, TAU / 2, TAU, LOOKS, 40, 1, judged=LOOKS, others=False)
    starts = bench.simulate(items, n, 2 * TAU, TAU, LOOKS, 300, 2, judged=2, others=False)
    assert not bench.missed(runs[bench.PACKAGE].any(axis=1), starts[bench.PACKAGE].any(axis=1))


def test_a_rule_that_misses_by_more_than_chance_is_told(bench):
    few, none, all_of_them = np.arange(400) < 12, np.zeros(400, bool), np.ones(400, bool)
    assert not bench.missed(few, all_of_them) and not bench.missed(none, ~few)
    assert bench.missed(all_of_them, all_of_them) and bench.missed(none, ~(np.arange(400) < 40))
    assert bench.interval(0, 400) == pytest.approx((0.0, 0.0095), abs=1e-3)


def test_the_table_names_every_rule(bench, monkeypatch, capsys):
    words = ["--tau", "0.15", "--factors", "1", "--runs", "4", "--looks", "3"]
    monkeypatch.setattr(sys, "argv", ["gate_simulation.py", *words])
    monkeypatch.setenv("COLUMNS", "160")
    assert bench.main() in (0, 1)
    text = capsys.readouterr().out
    for word in (bench.PACKAGE, "estimate above tau", "McNemar at alpha / looks", "alarms over 3 looks", "0.300"):
        assert word in text


def test_items_that_are_neither_right_nor_wrong_are_refused(bench, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"probe": "p", "id": 1, "step": s, "score": 0.5}) + "\n" for s in (0, 1)))
    with pytest.raises(ValueError, match="0 or 1"):
        bench.Recorded.read(path)

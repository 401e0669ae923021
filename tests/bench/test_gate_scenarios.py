"""Scenarios of the gates: what a run wrote down becomes a course, a judgement, a table and a picture."""

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
GENERAL = {"name": "general", "probes": ["p", "q"], "threshold": 0.05, "disarmed": ""}
GAIN = {"threshold": 0.005, "budget_tokens": 300}
RULES = {"kind": "gates", "step": 0, "item_gates": [GENERAL], "perplexity_limit": 0.15, "gain": GAIN}
END = {"step": 20, "tokens": 200, "run_id": "r", "next_command": "", "reason": "", "state": "finished", "exit_code": 0}


@pytest.fixture
def load(monkeypatch):
    for folder in (ROOT / "tools", ROOT / "tools" / "bench"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


@pytest.fixture
def bench(load):
    return load("gate_scenarios")


class Recorder:
    """Writes the files of a run, a line a second."""

    def __init__(self, folder: Path):
        self.folder, self.seconds = folder, 0
        folder.mkdir()

    def line(self, **line) -> None:
        self.seconds += 1
        with open(self.folder / "ledger.jsonl", "a") as stream:
            stream.write(json.dumps({"time_s": 1000.0 + self.seconds, **line}) + "\n")

    def look(self, kind: str, step: int, domain: float, general: float, right: int, **more) -> None:
        """``right`` of ten items; another probe's are none of the gate's."""
        path = self.folder / "items.jsonl"
        start = path.stat().st_size if path.exists() else 0
        items = [{"probe": "pq"[n % 2], "id": str(n), "score": float(n < right)} for n in range(10)]
        with open(path, "a") as stream:
            stream.writelines(json.dumps(item) + "\n" for item in [*items, {"probe": "z", "id": "0", "score": -9.0}])
        place = {"step": step, "tokens": 10 * step, "items": [start, path.stat().st_size], "look_s": 0.5}
        self.line(kind=kind, **place, perplexity={"domain": domain, "general": general}, **more)

    def verdict(self, step, domain, general, right, action="continue", rule="", level="none", reason="fine") -> None:
        found = [{"rule": rule, "level": level, "action": action, "reason": reason}] if rule else []
        self.look("verdict", step, domain, general, right, action=action, verdicts=found)

    def start(self) -> None:
        self.line(kind="restore", step=0)
        self.look("baseline", 0, 100.0, 50.0, 6)
        self.line(**RULES)

    def end(self, **status) -> Path:
        (self.folder / "status.json").write_text(json.dumps(END | status))
        return self.folder


@pytest.fixture
def healthy(tmp_path):
    run = Recorder(tmp_path / "healthy")
    run.start()
    run.verdict(10, 80.0, 49.0, 6, rule="general", level="soft", action="warn")
    run.verdict(20, 60.0, 49.0, 7)
    return run.end()


@pytest.fixture
def harmful(tmp_path):
    """Back once, to the first look; the same step is looked at twice, of other weights."""
    run = Recorder(tmp_path / "harmful")
    run.start()
    run.verdict(10, 80.0, 55.0, 6)
    run.verdict(20, 70.0, 65.0, 5, "roll_back", "general_perplexity_limit", "hard", "too high")
    run.line(kind="rollback", step=20, tokens=200, to_step=10, steering={"lr_scale": 0.1}, raised_replay=0.2)
    run.seconds += 50  # of a new start
    run.line(kind="restore", step=10)
    run.verdict(20, 72.0, 52.0, 6)
    return run.end()


@pytest.fixture
def items_alone(tmp_path):
    run = Recorder(tmp_path / "items")
    run.start()
    run.verdict(20, 70.0, 65.0, 2, "roll_back", "general", "hard", "worse")
    run.line(kind="rollback", step=20, tokens=200, to_step=0, steering={"lr_scale": 0.1}, raised_replay=0.2)
    run.line(kind="restore", step=0)
    run.verdict(20, 72.0, 52.0, 6)
    return run.end()


@pytest.fixture
def ungated(tmp_path):
    run = Recorder(tmp_path / "ungated")
    run.start()
    run.verdict(20, 65.0, 65.0, 4, "warn", "general_perplexity_limit", "hard")
    return run.end()


@pytest.fixture
def flat(tmp_path):
    run = Recorder(tmp_path / "flat")
    run.start()
    run.verdict(10, 99.9, 50.0, 6, rule="domain_gain", level="soft")
    run.verdict(20, 99.9, 50.0, 6, "stop", "domain_gain", "hard", "100 of 300 tokens are left")
    return run.end(state="gate_stop", exit_code=80, reason="100 of 300 tokens are left")


@pytest.fixture
def runs(bench, load, healthy, harmful, items_alone, ungated, flat):
    """One of each, as they should be."""
    folders, names = (healthy, harmful, items_alone, ungated, flat), [scenario.name for scenario in bench.SCENARIOS]
    read = load("gate_courses").read_course
    return [
        bench.Run(name, 1, folder, read(folder), True, "step 20") for name, folder in zip(names, folders, strict=True)
    ]


def test_a_course_is_read_from_the_ledger_with_what_a_rollback_gave_up(load, harmful):
    course = load("gate_courses").read_course(harmful)
    assert [(look.step, look.action, look.back_to) for look in course.looks] == [
        (0, "none", None), (10, "continue", None), (20, "roll_back", 100), (20, "continue", None),
    ]  # fmt: skip
    assert course.change("general") == pytest.approx(0.04) and course.change("domain") == pytest.approx(-0.28)
    assert course.lr_scale == 0.1 and course.raised_replay == 0.2
    assert course.hard == ["general_perplexity_limit (1)"] and course.soft == []
    assert [look.accuracy for look in course.looks] == [0.6, 0.6, 0.5, 0.6]
    assert course.look_s == 2.0 and course.wall_s == 6.0  # nothing between the rollback and the next start
    assert course.perplexity_limit == 0.15 and course.items_threshold == 0.05
    assert course.gain_limit == pytest.approx(100**0.995 / 100 - 1) and course.budget_tokens == 300


def test_a_run_that_is_judged_again_after_its_end_is_told_of_once(load, flat):
    run = Recorder.__new__(Recorder)
    run.folder, run.seconds = flat, 100
    run.line(kind="restore", step=20)
    run.verdict(20, 99.9, 50.0, 6, "stop", "domain_gain", "hard")
    assert [look.step for look in load("gate_courses").read_course(flat).looks] == [0, 10, 20]


def test_a_folder_without_verdicts_is_no_course(load, tmp_path):
    with pytest.raises(ValueError, match="no ended run"):
        load("gate_courses").read_course(tmp_path)


def test_runs_as_they_should_be_have_no_problems(bench, runs):
    assert bench.problems(runs) == []


@pytest.mark.parametrize(("number", "change", "said"), [
    (0, {"exit_code": 80}, "ended with 80"),
    (1, {"lr_scale": 1.0}, "nothing was adjusted"),
    (1, {"exit_code": 80}, "ended with 80"),
    (2, {"lr_scale": 1.0}, "nothing was adjusted"),
    (3, {"exit_code": 80}, "did more than warn"),
    (4, {"exit_code": 0}, "not stopped"),
    (4, {"reason": "because"}, "no word of savings"),
])  # fmt: skip
def test_what_is_not_as_promised_is_said(bench, runs, number, change, said):
    runs[number] = replace(runs[number], course=replace(runs[number].course, **change))
    (problem,) = bench.problems(runs)
    assert said in problem and problem.startswith(f"{runs[number].scenario}, seed 1")


@pytest.mark.parametrize(("number", "other", "said"), [
    (0, 1, "hard verdicts: general_perplexity_limit (1)"),
    (0, 4, "domain perplexity -0.1%"),
    (1, 0, "no rollback"),
    (1, 2, "rolled back for something else than general_perplexity_limit"),
    (2, 1, "rolled back for something else than general"),
    (3, 1, "did more than warn"),
    (4, 0, "not stopped"),
])  # fmt: skip
def test_the_course_of_another_scenario_is_none_of_this(bench, runs, number, other, said):
    runs[number] = replace(runs[number], course=runs[other].course)
    assert any(said in problem for problem in bench.problems(runs))


def test_general_text_must_end_better_than_without_gates(bench, runs):
    better = replace(runs[0].course, looks=runs[0].course.looks)
    runs[3] = replace(runs[3], course=better)
    said = "seed 1: general perplexity +4.0%, without gates -2.0%"
    assert bench.problems(runs) == [f"{name}, {said}" for name in (bench.HARMFUL_NAME, bench.ITEMS_NAME)]


def test_decisions_that_come_out_otherwise_are_a_problem(bench, runs):
    runs[4] = replace(runs[4], replayed=False)
    assert bench.problems(runs) == ["flat, seed 1: decisions come out otherwise when they are taken again"]


def test_the_table_has_a_line_a_run_and_the_share_of_looks(bench, runs):
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.table(runs))
    text = console.export_text()
    for word in ("-40.0%", "+30.0%", "0k to 0k", "domain_gain (1)", "equal", "looks took 34% of all runs' time"):
        assert word in text, word


def test_a_report_leaves_pictures_and_values(bench, runs, tmp_path):
    assert bench.report(tmp_path, runs, Console(quiet=True)) == 0
    assert len(list(tmp_path.glob("*.png"))) == len(bench.SCENARIOS)
    assert json.loads((tmp_path / "gate_scenarios.json").read_text())["runs"][1]["rollbacks"] == [[200, 100]]


def test_items_of_word_order_have_the_texts_own_among_others(load, tmp_path):
    words = [f"w{n}" for n in range(20)]
    (tmp_path / "texts.jsonl").write_text(
        json.dumps({"text": " ".join(words)}) + "\n" + json.dumps({"text": "a " * 30})
    )
    write = load("gate_items").write_word_order
    count = write(tmp_path / "texts.jsonl", tmp_path / "a.jsonl")
    items = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert count == len(items) == 2  # of words that are all the same there is one order
    for item, place in zip(items, (8, 12), strict=True):
        assert item["question"] == " ".join(words[place - 8 : place])
        right, others = item["choices"][item["answer"]], {*item["choices"]}
        assert right == " ".join(words[place : place + 6]) and len(others) == 4
        assert {tuple(sorted(choice.split())) for choice in others} == {tuple(sorted(right.split()))}
    write(tmp_path / "texts.jsonl", tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_gates_do_what_they_promise_to_runs_of_the_quickstart(tmp_path):
    command = ["bash", str(ROOT / "tools" / "bench" / "gate_scenarios.sh"), str(tmp_path), "--seeds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(list(tmp_path.glob("*.png"))) == 5

"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest

from cpt_mega.checkpoint.retention import PERMANENT, PINNED, ROLLING, START, removable, trim
from cpt_mega.checkpoint.trainer_state import read_state
from cpt_mega.gates.selection import choose
from cpt_mega.hf.weights import model_digest
from cpt_mega.lineage import is_complete, seal_folder
from tests.helpers.jobsite import metrics

KINDS = {1: ROLLING, 2: PERMANENT, 3: ROLLING, 4: PINNED, 5: ROLLING, 6: PERMANENT, 7: ROLLING}


@pytest.mark.parametrize(
    ("rolling", "permanent", "kept", "expected"),
    [
        (2, None, (), [1, 3]),
        (1, None, (), [1, 3, 5]),
        (1, 1, (), [1, 2, 3, 5]),
        (1, 1, (3, 2), [1, 5]),
        (9, 9, (), []),
        (2, None, (99,), [1, 3]),
    ],
)
def test_the_newest_of_each_kind_and_what_must_stay_stay(rolling, permanent, kept, expected):
    assert removable(KINDS, rolling, permanent, kept) == expected


def test_what_a_run_begins_from_stays_as_long_as_it_must():
    kinds = {0: START, 5: ROLLING, 10: PERMANENT}
    assert removable(kinds, 2, None, {0}) == [] and removable(kinds, 2, None, ()) == [0]


def test_the_newest_stays_of_whatever_kind():
    assert removable({1: PERMANENT, 2: PERMANENT}, 1, 1, ()) == [1]
    assert removable({1: ROLLING, 2: PERMANENT, 3: PERMANENT}, 1, 1, ()) == [2]
    assert removable({}, 1, 1, ()) == []


def _saved(run, step, content=None, complete=True):
    folder = run / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"kind": ROLLING} if content is None else content))
    if complete:
        seal_folder(folder)
    return folder


def test_what_is_not_complete_or_says_nothing_of_itself_is_not_touched(tmp_path):
    for step, content in ((1, None), (2, None), (3, "text"), (4, None), (5, {})):
        _saved(tmp_path, step, content, complete=step != 2)
    assert trim(tmp_path, 9, 1, None, ()) == ["iter_0000001"]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"iter_{step:07d}" for step in (2, 3, 4, 5)]


def test_what_was_passed_over_as_damaged_pushes_out_nothing(tmp_path):
    """Above the step just saved lies what could not be restored from; it must not count as the newest."""
    for step in (100, 150, 200, 300):
        _saved(tmp_path, step)
    assert trim(tmp_path, 150, 1, None, ()) == ["iter_0000100"]


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    stuck, *_ = [_saved(tmp_path, step) for step in (1, 2, 3)]
    unlink = Path.unlink

    def refusing(path, *arguments):
        if path.parent == stuck:
            raise PermissionError("not yours")
        unlink(path, *arguments)

    monkeypatch.setattr(Path, "unlink", refusing)
    assert trim(tmp_path, 3, 1, None, ()) == ["iter_0000002"] and is_complete(stuck)


def _kinds(run) -> dict[int, str]:
    states = [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/iter_*/trainer_state.json"))]
    return {state["step"]: state["kind"] for state in states}


def test_a_run_keeps_its_record_the_last_before_the_decay_the_newest_and_the_best(workers, jobsite, tmp_path):
    """Looks at every step: all are checkpoints, of which the rolling ones go."""
    words = [
        f"run.dir={tmp_path / 'run'}",
        "train.tokens=3000",
        "eval.interval_tokens=1",
        "checkpoint.interval_tokens=1000",
        "checkpoint.keep_rolling=1",
        "schedule.kind=wsd",
        "schedule.decay_tokens=1300",
        "gates.general_perplexity_limit=9.0",
        "checkpoint.export_hf=best",
        "optimizer.lr=0.05",  # so high that the last step is not the best
    ]
    workers(1).run("train", config=jobsite.config, overrides=words)
    kinds, lines = _kinds(tmp_path / "run"), metrics(tmp_path / "run", "train")
    tokens = {line["step"]: line["tokens"] for line in lines}
    before = {step: tokens.get(step - 1, 0) for step in tokens}
    record = [step for step in tokens if before[step] // 1000 < tokens[step] // 1000]
    undecayed = next(step for step in tokens if tokens[step] + 8 * 32 > 1700)
    assert {step for step, kind in kinds.items() if kind == PERMANENT} == {*record, max(tokens)}
    assert kinds[undecayed] == (PERMANENT if undecayed in record else PINNED) and tokens[undecayed] <= 1700
    looks = read_state(tmp_path / "run" / "checkpoints" / f"iter_{max(tokens):07d}").gate_history
    best = choose(looks, set(tokens)).step  # of all that ever were, though most are gone
    rolling = [step for step, kind in kinds.items() if kind == ROLLING]
    assert model_digest(tmp_path / "run" / "export") == model_digest(tmp_path / f"run/checkpoints/iter_{best:07d}")
    assert best in kinds and best != max(tokens) and len(rolling) <= 2 and len(looks) == len(tokens) > len(kinds)
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[undecayed] == max(rates.values())


def test_save_pins_and_a_stop_is_rolling(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "SAVE").touch()
    workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={run}"])
    assert _kinds(run)[1] == PINNED
    other = tmp_path / "other"
    other.mkdir()
    (other / "STOP").touch()
    workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={other}"])
    assert _kinds(other) == {1: ROLLING}


def test_rolling_checkpoints_come_by_tokens_and_by_the_clock(workers, jobsite, tmp_path):
    words = ["checkpoint.keep_rolling=99", "eval.sets=[]"]
    for name, option in (("tokens", "rolling_interval_tokens=1"), ("minutes", "rolling_interval_minutes=1e-9")):
        run = tmp_path / name
        workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={run}", f"checkpoint.{option}", *words])
        kinds = _kinds(run)
        assert len(kinds) == len(metrics(run, "train")) and set(list(kinds.values())[:-1]) == {ROLLING}

"""Files of a run folder that are read back, damaged: a run goes on with what can be read of them."""

import json

import pytest
from hypothesis import given, settings

from cpt_mega.errors import InputError
from cpt_mega.loop.lease import Owner, holder
from cpt_mega.loop.replay import Replay
from cpt_mega.loop.run_folder import METRICS, RunFolder, drop_lines_after, ended_since, read_lines, read_status
from tests.helpers.mutations import damaged_bytes, damaged_json, overwrite

CI = settings(max_examples=60, deadline=None, derandomize=True, database=None)
STATUS = {"state": "fault", "exit_code": 70, "reason": "", "step": 3, "tokens": 30, "run_id": "id", "next_command": "c"}
LINE = {"kind": "train", "step": 2, "tokens_by_source": {"a": 20}, "epochs_by_source": {"a": 0.5}}
ENTRY = {
    "kind": "data",
    "time_s": 1.0,
    "step": 0,
    "packing": "best_fit",
    "packing_version": 2,
    "seq_length": 8,
    "rows": 2,
    "seed": 1,
    "max_epochs": None,
    "at_max_epochs": "stop",
    "row_checks": {"action": "off"},
    "sources": [{"name": "a", "role": "domain", "path": "/nowhere/a", "identity": "i"}],
    "state": {"sources": {}, "configured": None, "in_effect": None, "since": 0, "excluded": {}, "dropped": []},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@CI
@given(content=damaged_json(json.dumps(STATUS).encode()))
def test_a_damaged_status_is_none_or_one(folder, content):
    overwrite(folder / "status.json", content)
    status = read_status(folder)
    if status is not None:
        assert type(status.get("step", 0)) is int and type(status.get("exit_code", 0)) in (int, type(None))
        assert isinstance(ended_since(folder, 0), bool)


@CI
@given(content=damaged_bytes("".join(json.dumps(LINE | {"step": step}) + "\n" for step in (1, 2, 3)).encode()))
def test_damaged_metrics_lose_damaged_lines_and_no_others(folder, content):
    overwrite(folder / METRICS, content)
    drop_lines_after(folder / METRICS, 2)
    kept = read_lines(folder / METRICS)
    assert all(line["step"] <= 2 for line in kept)
    whole = {step for step in (1, 2) if json.dumps(LINE | {"step": step}).encode() in content.split(b"\n")}
    assert {line["step"] for line in kept} >= whole


@CI
@given(content=damaged_json(json.dumps(LINE).encode()))
def test_lines_of_any_values_can_be_dropped(folder, content):
    overwrite(folder / METRICS, content)
    drop_lines_after(folder / METRICS, 2)


@CI
@given(entry=damaged_json(json.dumps(ENTRY).encode()), line=damaged_json(json.dumps(LINE).encode()))
def test_a_damaged_ledger_is_refused_or_replayed(folder, entry, line):
    overwrite(folder / "ledger.jsonl", entry)
    overwrite(folder / METRICS, line)
    try:
        replay = Replay(folder)
        assert replay.last_step >= 0
        replay.rows_of(1)
    except InputError as error:
        assert error.field
    else:
        raise AssertionError("its corpus is not there")


@CI
@given(content=damaged_json(Owner.here().document(3)))
def test_a_damaged_lease_is_nobodys_or_somebodys(folder, content):
    overwrite(folder / ".lease", content)
    assert holder(folder) is None or isinstance(holder(folder), str)


def test_a_lease_that_is_a_folder_is_said_in_words(tmp_path):
    (tmp_path / ".lease").mkdir()
    assert "cannot be written" in RunFolder(tmp_path, writes=True).claim()

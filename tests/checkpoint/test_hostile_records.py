"""What a checkpoint folder says of itself, damaged: whoever reads it refuses it in one line, or has what can be used."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_mega.checkpoint.inspection import differences, inspect
from cpt_mega.checkpoint.record import read_record
from cpt_mega.checkpoint.retention import trim
from cpt_mega.checkpoint.trainer_state import FORMAT, STATE_FILE, TrainerState, read_state
from cpt_mega.checkpoint.verification import verify
from cpt_mega.errors import CheckpointError
from cpt_mega.gates.selection import choose
from cpt_mega.hf.convert import import_hf
from cpt_mega.lineage import MANIFEST, damaged_files, seal_folder, sealed_files
from tests.helpers.models import tiny_llama
from tests.helpers.mutations import damaged_json, nested, overwrite

CI = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCORE = {"gain": -0.1, "low": -0.2, "high": None, "of": {"digest": "text"}}
LOOK = {"step": 8, "tokens": 400, "perplexity": {"general": 9.5}, "action": "continue"}
LOOK |= {"scores": {"general": SCORE}, "weights": {"domain": 1.0, "general": 2.0}}
STATE = TrainerState(
    run_id="run",
    parent="/nowhere",
    step=8,
    tokens=400,
    stream={"sources": {"domain": {"rows_taken": 3, "tokens": 400}}},
    baseline={"general": 9.0},
    source_losses={"domain": [2.5, 1]},
    judged_step=8,
    gate_history=[LOOK],
    layout={"tp": 1, "pp": 1, "dp": 1},
    lineage={"tokenizer_digest": "t", "corpora": {"domain": "d"}, "eval": {"general": "e"}, "weights": "w"},
)
GOOD = json.dumps({"format": FORMAT, **asdict(STATE)}).encode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "checkpoints" / "iter_0000008"
    tiny_llama(folder.parent.parent / "hf", num_hidden_layers=1)
    folder.parent.mkdir()
    import_hf(folder.parent.parent / "hf", folder)
    (folder / STATE_FILE).write_bytes(GOOD)
    seal_folder(folder)
    return folder


@CI
@given(content=damaged_json(GOOD))
def test_a_damaged_state_is_refused_or_one_to_go_on_from(checkpoint, content):
    overwrite(checkpoint / STATE_FILE, content)
    try:
        state = read_state(checkpoint)
    except CheckpointError as error:
        assert STATE_FILE in str(error) and "\n" not in str(error)
    else:
        assert state.health in ("healthy", "unhealthy", "not judged", "perplexity only", "warned")
        assert state.step >= 0 and all(look["perplexity"].get("x") is None for look in state.gate_history)
        assert choose(state.gate_history, {8}).step in (8, None)
        assert state.lineage == {} or {"tokenizer_digest", "corpora", "eval"} <= state.lineage.keys()


@CI
@given(content=damaged_json(GOOD))
def test_who_only_looks_is_told_what_there_is(checkpoint, content):
    overwrite(checkpoint / STATE_FILE, content)
    try:
        record = read_record(checkpoint)
    except CheckpointError as error:
        assert STATE_FILE in str(error)
        return
    json.dumps(record.to_json())
    found = inspect(checkpoint)
    assert not differences(found, found).lineage


SEAL = json.dumps(
    {"files": {"hf/config.json": {"bytes": 3, "sha256": "0" * 64}, STATE_FILE: {"bytes": 2, "sha256": "1"}}}
)


@CI
@given(content=damaged_json(SEAL.encode()))
def test_a_damaged_seal_is_refused_or_says_which_files_are_not_those(checkpoint, content):
    overwrite(checkpoint / STATE_FILE, GOOD)
    kept = (checkpoint / MANIFEST).read_bytes()
    overwrite(checkpoint / MANIFEST, content)
    try:
        files = sealed_files(checkpoint)
    except CheckpointError as error:
        assert MANIFEST in str(error)
    else:
        assert set(damaged_files(checkpoint, files)) == set(files)
    finally:
        overwrite(checkpoint / MANIFEST, kept)


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "b/" * 500 + "c", "\0", ""])
def test_a_seal_names_only_what_can_be_a_file(checkpoint, name):
    kept = (checkpoint / MANIFEST).read_bytes()
    overwrite(checkpoint / MANIFEST, json.dumps({"files": {name: {"bytes": 1, "sha256": "0"}}}).encode())
    try:
        with pytest.raises(CheckpointError, match="not in the folder"):
            sealed_files(checkpoint)
    finally:
        overwrite(checkpoint / MANIFEST, kept)


@settings(CI, max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_or_lost_end_of_any_file_is_a_problem(checkpoint, data):
    overwrite(checkpoint / STATE_FILE, GOOD)
    seal_folder(checkpoint)
    assert sorted(sealed_files(checkpoint))
    path = checkpoint / data.draw(st.sampled_from([*sorted(sealed_files(checkpoint)), MANIFEST]))
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:place] + bytes([good[place] ^ 1 << data.draw(st.integers(0, 7))]) + good[place + 1 :]
    overwrite(path, data.draw(st.sampled_from([flipped, good[:place]])))
    try:
        if path.name != MANIFEST or path.read_bytes().split() != good.split():  # blanks of the seal mean nothing
            assert any(path.name in problem.what or problem.what for problem in verify(checkpoint).problems)
    finally:
        overwrite(path, good)


def test_a_state_that_does_not_say_what_it_is_is_not_removed(checkpoint):
    overwrite(checkpoint / STATE_FILE, b'{"kind": ' + nested(100_000).encode() + b"}")
    assert trim(checkpoint.parent.parent, 100, 0, 0, ()) == []

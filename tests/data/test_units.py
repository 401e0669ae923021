import os

import pyarrow
import pyarrow.parquet
import pytest

from cpt_mega.data import units
from cpt_mega.data.units import plan_units, shard_of, survey
from cpt_mega.errors import InputError
from tests.helpers.corpora import write_jsonl


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """One of each kind, cut into many units."""
    monkeypatch.setattr(units, "LEAST_UNIT_BYTES", 100)
    write_jsonl(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)])
    table = pyarrow.table({"text": [f"text {number}" for number in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=10)
    for number in range(12):
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / f"{number:02d}.py").write_text("x = 1\n" * 10)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "code")]


def test_units_stand_for_every_byte_once(inputs):
    planned = plan_units(survey(inputs))
    for index, path in enumerate(inputs):
        own = [unit for unit in planned if unit.source == index]
        size = 720 if os.path.isdir(path) else os.path.getsize(path)
        assert len(own) > 2 and sum(unit.input_bytes for unit in own) == size
    assert [unit.source for unit in planned] == sorted(unit.source for unit in planned)


def test_shards_are_consecutive_and_complete(inputs):
    planned = plan_units(survey(inputs))
    for shards in (1, 3, len(planned), len(planned) + 5):
        dealt = [shard_of(planned, index, shards) for index in range(shards)]
        assert sum(dealt, []) == planned
        sizes = list(map(len, dealt))
        assert max(sizes) - min(sizes) <= 1


def test_a_stamp_changes_with_what_is_written(inputs, tmp_path):
    before = [one.stamp for one in survey(inputs)]
    assert [one.stamp for one in survey(inputs)] == before
    for path in (tmp_path / "a.jsonl", tmp_path / "code" / "03.py"):
        os.utime(path, (1, 1))
    after = [one.stamp for one in survey(inputs)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False]


def test_units_are_neither_too_many_nor_too_large():
    def count(size):
        return len(plan_units([units.Input("/x/a.jsonl", (), (), size, "")]))

    assert count(1) == 1 and count(10 << 20) == 10 and count(1 << 30) == 64 and count(1 << 40) == 32768


def test_unusable_inputs_are_refused(tmp_path):
    (tmp_path / "in.xml").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        "absent.jsonl": "no such file or folder",
        "in.xml": "give files that end in one of .jsonl",
        "empty": "no file",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            survey([str(tmp_path / name)])

import gzip

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from cpt_mega.data import readers
from cpt_mega.data.readers import CompressedJsonl, Document, Fields, JsonlRange
from cpt_mega.data.units import plan_units, survey
from cpt_mega.errors import InputError
from tests.helpers.corpora import write_jsonl

TEXT = Fields()


def read(path, fields=TEXT, **options):
    """Everything in a file, by the units that are planned for it, with line numbers as the file counts them."""
    items = []
    for unit in plan_units(survey([str(path)], **options)):
        for batch in unit.read(fields):
            items += batch.items
    return items


def texts(items):
    return [item.content if isinstance(item, Document) else item.kind for item in items]


@pytest.mark.parametrize("batch_bytes", [1, 40, 1 << 20])
def test_lines_keep_order_and_numbers(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(readers, "BATCH_BYTES", batch_bytes)
    path = str(write_jsonl(tmp_path / "in.jsonl", [f"text {number}" for number in range(10)]))
    size, line, found = (tmp_path / "in.jsonl").stat().st_size, 0, []
    for batch in JsonlRange(0, path, 0, size).read(TEXT):
        found += [(line + item.line, item.content) for item in batch.items] if len(batch.items) == 1 else []
        line += batch.lines
    assert line == 10
    if batch_bytes < 40:
        assert found == [(number + 1, f"text {number}") for number in range(10)]


@pytest.mark.parametrize("cut", range(1, 90, 7))
def test_every_line_belongs_to_one_range(tmp_path, cut):
    """Wherever a file is cut: in a line, at its end, in a letter of several bytes, within one line twice."""
    lines = ["a", "naïve 北京", "", "x" * 30, "z"]
    path = str(write_jsonl(tmp_path / "in.jsonl", lines))
    size = (tmp_path / "in.jsonl").stat().st_size
    edges = sorted({0, min(cut, size), min(cut + 9, size), size})
    ranges = [JsonlRange(0, path, start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    found = [list(one.read(TEXT)) for one in ranges]
    assert [item.content for batches in found for batch in batches for item in batch.items] == lines
    assert sum(batch.lines for batches in found for batch in batches) == 5
    assert sum(one.input_bytes for one in ranges) == size


def test_a_line_longer_than_many_ranges_is_read_once(tmp_path):
    lines = ["a", "long " * 500, "b"]
    path = str(write_jsonl(tmp_path / "in.jsonl", lines))
    size = (tmp_path / "in.jsonl").stat().st_size
    ranges = [JsonlRange(0, path, start, min(start + 100, size)) for start in range(0, size, 100)]
    counts = [sum(len(batch.items) for batch in one.read(TEXT)) for one in ranges]
    assert sum(counts) == 3 and counts[0] == 2 and set(counts[1:-1]) == {0}


def test_the_last_line_needs_no_end_and_carriage_returns_are_no_text(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(item.line, item.content) for item in read(tmp_path / "in.jsonl")] == [(1, "a"), (3, "b")]


def test_line_separators_inside_a_text_do_not_end_it(tmp_path):
    (tmp_path / "in.jsonl").write_bytes('{"text": "a\u2028b\u0085c"}\n'.encode())
    assert texts(read(tmp_path / "in.jsonl")) == ["a\u2028b\u0085c"]


def test_another_field(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"body": "a"}\n{"text": "b"}\n{"body": ["c"]}\n')
    expected = ["a", "no field 'body'", "field 'body' is not text"]
    assert texts(read(tmp_path / "in.jsonl", Fields("body"))) == expected
    expected = ["field 'body' is not a list of messages", "no field 'body'", ["c"]]
    assert texts(read(tmp_path / "in.jsonl", Fields("body", chat=True))) == expected


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
@pytest.mark.parametrize("batch_bytes", [50, 1 << 20])
def test_compressed_files_read_as_plain_ones(tmp_path, monkeypatch, name, batch_bytes):
    monkeypatch.setattr(readers, "BATCH_BYTES", batch_bytes)
    lines = [*(f"text {number} 北" for number in range(30)), b"{broken", "last"]
    plain = b"\xef\xbb\xbf" + write_jsonl(tmp_path / "plain.jsonl", lines).read_bytes().removesuffix(b"\n")
    middle = len(plain) // 2  # two members one behind the other, as appending writers leave them
    pack = gzip.compress if name.endswith("gz") else zstd.compress
    (tmp_path / name).write_bytes(pack(plain[:middle]) + pack(plain[middle:]))
    items = read(tmp_path / name)
    assert texts(items) == [*lines[:30], "not JSON", "last"]
    assert [item.line for item in items] == list(range(1, 33))
    (unit,) = plan_units(survey([str(tmp_path / name)]))
    assert sum(batch.input_bytes for batch in unit.read(TEXT)) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b"x" + raw[1:]], ids=["cut", "not one"])
def test_a_damaged_compressed_file_is_named(tmp_path, name, damage):
    pack = gzip.compress if name.endswith("gz") else zstd.compress
    (tmp_path / name).write_bytes(damage(pack(write_jsonl(tmp_path / "p.jsonl", ["text"] * 100).read_bytes())))
    with pytest.raises(InputError, match=f"{name}.*cannot be unpacked"):
        read(tmp_path / name)


def write_parquet(path, values, kind=None, **options):
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(len(values)), "text": pyarrow.array(values, kind)}), path, **options
    )


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_are_documents(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "BATCH_BYTES", 200)
    values = [f"text {number} 北" for number in range(50)]
    values[7] = None
    write_parquet(tmp_path / "in.parquet", values, kind, row_group_size=8)
    items = read(tmp_path / "in.parquet")
    assert texts(items) == [*values[:7], "field 'text' is not text", *values[8:]]
    assert [item.line for item in items] == list(range(1, 51))


def test_parquet_chats_are_lists_of_messages(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_parquet(tmp_path / "in.parquet", [chat])
    (item,) = read(tmp_path / "in.parquet", Fields("text", chat=True))
    assert item.content == chat


def test_keys_that_parquet_messages_lack_are_not_there(tmp_path):
    chat = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": None, "name": None}]
    write_parquet(tmp_path / "in.parquet", [chat])
    (item,) = read(tmp_path / "in.parquet", Fields("text", chat=True))
    assert item.content == [chat[0], {"role": "assistant", "content": None}]


def test_a_file_that_was_cut_ends_the_work(tmp_path):
    path = str(write_jsonl(tmp_path / "in.jsonl", ["a"] * 3))
    for start in (10, 3000):
        with pytest.raises(InputError, match="became shorter"):
            list(JsonlRange(0, path, start, 4000).read(TEXT))


def test_a_parquet_text_that_is_not_utf8_is_a_reject_of_its_own(tmp_path):
    raw = pyarrow.array([b"good", b"\xff\xfe", b"also"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "in.parquet")
    assert texts(read(tmp_path / "in.parquet")) == ["good", "not UTF-8", "also"]


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(InputError, match="in.parquet.*cannot be read as Parquet"):
        read(tmp_path / "in.parquet")


def test_a_parquet_file_without_the_field_is_named(tmp_path):
    write_parquet(tmp_path / "in.parquet", ["a"])
    with pytest.raises(InputError, match="--field = 'body': no column of .*give one of n, text"):
        read(tmp_path / "in.parquet", Fields("body"))


def test_files_of_a_folder_are_documents_with_their_paths(tmp_path):
    folder = tmp_path / "code"
    (folder / "pkg" / ".git").mkdir(parents=True)
    contents = {
        "b.py": b"b = 1\n",
        "a.py": "\ufeffnaïve\n".encode(),
        "pkg/c.py": b"",
        "pkg/latin.py": b"\xe9",
        "pkg/program.py": b"\x7fELF\0",
        "pkg/.git/hidden.py": b"x",
        ".hidden.py": b"x",
        "notes.txt": b"notes",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "link.py").symlink_to(folder / "b.py")
    items = read(folder, include=["*.py"])
    assert texts(items) == ["naïve\n", "b = 1\n", "", "not UTF-8", "binary"]
    expected = ["a.py", "b.py", "pkg/c.py", "pkg/latin.py", "pkg/program.py"]
    assert [item.path for item in items] == [str(folder / name) for name in expected]
    assert texts(read(folder / "notes.txt")) == ["notes"]


def test_a_compressed_file_is_digested_as_it_is(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    unit = CompressedJsonl(0, str(tmp_path / "a.jsonl.gz"), (tmp_path / "a.jsonl.gz").stat().st_size)
    from cpt_mega.lineage import file_digest

    assert unit.digest() == file_digest(tmp_path / "a.jsonl.gz")

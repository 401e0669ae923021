import pytest

from cpt_mega.data import readers
from cpt_mega.data.readers import Document, check_input, read_chunks
from cpt_mega.errors import InputError
from tests.helpers.corpora import write_jsonl


@pytest.mark.parametrize("chunk_bytes", [1, 40, 1 << 20])
def test_chunks_keep_order_and_line_numbers(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    path = str(write_jsonl(tmp_path / "in.jsonl", [f"text {number}" for number in range(10)]))
    chunks = list(read_chunks(path, "text"))
    documents = [document for chunk in chunks for document in chunk.parse()]
    assert documents == [Document(path, number + 1, f"text {number}") for number in range(10)]
    assert sum(chunk.input_bytes for chunk in chunks) == (tmp_path / "in.jsonl").stat().st_size


def test_the_last_line_needs_no_end_and_carriage_returns_are_no_text(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}')
    (chunk,) = read_chunks(tmp_path / "in.jsonl", "text")
    assert [(document.line, document.text) for document in chunk.parse()] == [(1, "a"), (3, "b")]


def test_line_separators_inside_a_text_do_not_end_it(tmp_path):
    (tmp_path / "in.jsonl").write_bytes('{"text": "a\u2028b\u0085c"}\n'.encode())
    (chunk,) = read_chunks(tmp_path / "in.jsonl", "text")
    assert [document.text for document in chunk.parse()] == ["a\u2028b\u0085c"]


def test_another_field(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"body": "a"}\n')
    (chunk,) = read_chunks(tmp_path / "in.jsonl", "body")
    assert [document.text for document in chunk.parse()] == ["a"]


def test_unusable_inputs_are_refused(tmp_path):
    (tmp_path / "in.parquet").touch()
    for name, message in (("absent.jsonl", "no such file"), ("in.parquet", "give files that end in one of .jsonl")):
        with pytest.raises(InputError, match=message):
            check_input(tmp_path / name)

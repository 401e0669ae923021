"""Headers of safetensors files that lie."""

import json

import pytest

from cpt_mega.errors import InputError
from cpt_mega.hf.safetensors_io import INDEX, SINGLE, find_tensors


def entry(begin, end, *shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def write(path, header, length=None):
    """A file with 16 bytes of data; ``length`` is what it says of its header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(16))


LIES = {
    "below": {"a": entry(-8, 8, 4)},
    "overlap": {"a": entry(0, 8, 2), "b": entry(4, 16, 3)},
    "gap": {"a": entry(8, 16, 2)},
    "beyond": {"a": entry(0, 80, 20)},
    "rest": {"a": entry(0, 8, 2)},
    "another shape": {"a": entry(0, 16, 2)},
    "more than there are numbers": {"a": entry(0, 16, 1 << 62, 4)},
    "nested": b'{"a":' + b"[" * 100_000,
    "no object": b"[]",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    write(tmp_path / SINGLE, LIES[lie])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("length", [17, 90_000_000, 1 << 40, (1 << 64) - 1])
def test_the_length_of_a_header_takes_no_memory(tmp_path, length):
    write(tmp_path / SINGLE, {"a": entry(0, 16, 4)}, length)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "", 3])
def test_an_index_names_files_beside_it(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match="same folder"):
        find_tensors(tmp_path)


def test_an_index_nested_without_end_is_named(tmp_path):
    (tmp_path / INDEX).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not a safetensors index"):
        find_tensors(tmp_path)


def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path):
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blob", {"a": entry(0, 16, 4)})
    (tmp_path / "snapshot" / SINGLE).symlink_to(tmp_path / "blob")
    assert find_tensors(tmp_path / "snapshot")["a"].shape == (4,)

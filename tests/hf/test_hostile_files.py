"""Checkpoints and Hugging Face folders that are damaged: read as they are, or refused in one line, in little memory."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.convert import import_hf
from cpt_mega.hf.families import tensor_map
from cpt_mega.hf.model_info import MODEL_FILE, read_model_info
from cpt_mega.hf.source import open_source
from cpt_mega.hf.torch_dist import read_chunks, read_index
from cpt_mega.hf.untrusted import INDEX_FILE, first_refused, pickled_parts, read_metadata
from tests.helpers.models import tiny_llama
from tests.helpers.mutations import damaged_bytes, damaged_json, overwrite

CI = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LONG = settings(CI, max_examples=3000)
FILES = ["index", "model.json", "common.pt", "data", "safetensors", "safetensors text", "config.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    tiny_llama(folder / "hf", num_hidden_layers=1)
    import_hf(folder / "hf", folder / "ckpt")
    return folder


def refuse_pickles(checkpoint):
    error = first_refused(pickled_parts(checkpoint))
    if error is not None:
        raise error


def read_tensors(checkpoint):
    read_chunks(checkpoint, read_index(checkpoint), torch.float32, lambda key, offsets, chunk: None)


def read_model(checkpoint):
    shape = read_model_info(checkpoint).shape
    tensor_map(shape)
    shape.inverse_frequencies()


def header_of(content):
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def with_header(content, header):
    return len(header).to_bytes(8, "little") + header + content[8 + len(header_of(content)) :]


def _headers(damage):
    return lambda good: damage(header_of(good)).map(lambda header: with_header(good, header))


def case(made, name):
    """The file, how its content is damaged, and what reads it."""
    hf, checkpoint = made / "hf", made / "ckpt"
    weights = hf / "model.safetensors"
    binary = damaged_bytes
    return {
        "index": (checkpoint / INDEX_FILE, binary, lambda: read_metadata(checkpoint)),
        "model.json": (checkpoint / MODEL_FILE, damaged_json, lambda: read_model(checkpoint)),
        "common.pt": (checkpoint / "common.pt", binary, lambda: refuse_pickles(checkpoint)),
        "data": (checkpoint / "__0_0.distcp", binary, lambda: read_tensors(checkpoint)),
        "safetensors": (weights, _headers(binary), lambda: open_source(hf)),
        "safetensors text": (weights, _headers(damaged_json), lambda: open_source(hf)),
        "config.json": (hf / "config.json", damaged_json, lambda: open_source(hf)),
    }[name]


def damage_and_read(made, name, data):
    path, damage, read = case(made, name)
    good = path.read_bytes()
    overwrite(path, data.draw(damage(good)))
    try:
        read()
    except InputError as error:
        assert error.field and error.fix and "\n" not in str(error)
    finally:
        overwrite(path, good)


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_below_is_good(made, name):
    case(made, name)[2]()


@pytest.mark.parametrize("name", FILES)
@CI
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(made, name, data):
    damage_and_read(made, name, data)


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
@LONG
@given(data=st.data())
def test_many_damaged_files_are_read_or_refused(made, name, data):
    damage_and_read(made, name, data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 10**9),
        ("layers", 1.5),
        ("hidden_size", 2**40),
        ("head_dim", 2**31 - 2),
        ("head_dim", 15),
        ("kv_heads", 4),
        ("vocab_size", True),
        ("rope", {"theta": 1e4, "type": "none", "parameters": {}, "partial": 1.0}),
        ("rope", {"theta": float("nan"), "type": "default", "parameters": {}, "partial": 1.0}),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_made_of_it(made, tmp_path, field, value):
    shutil.copyfile(made / "ckpt" / MODEL_FILE, tmp_path / MODEL_FILE)
    values = json.loads((tmp_path / MODEL_FILE).read_text())
    values["shape"][field] = value
    (tmp_path / MODEL_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"model\.json.*{field if field != 'rope' else 'rope|theta'}"):
        read_model_info(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 10**9), ("head_dim", 2**30), ("rope_theta", 10**400)]
)
def test_nor_does_a_configuration_ask_for_what_cannot_be(made, tmp_path, field, value):
    shutil.copytree(made / "hf", tmp_path / "hf")
    config = json.loads((made / "hf/config.json").read_text()) | {field: value}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=field.replace("rope_theta", "rope")):
        open_source(tmp_path / "hf")


def tuples(depth):
    """A pickle of a key whose hash takes 2**depth steps."""
    return (
        b"\x80\x04}(K\x01\x94"
        + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(depth))
        + b"K\x02u."
    )


BOMBS = {
    "a far place of the memo": b"\x80\x02]r\xff\xff\xff\x0f.",
    "a key that is never hashed to its end": tuples(60),
    "a buffer": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
    "text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
    "a frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b".",
}
IN_LITTLE_MEMORY = """
import resource, sys
from cpt_mega.errors import CheckpointError
from cpt_mega.hf.untrusted import read_metadata
for folder in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_metadata(folder)
        print("read", folder)
    except CheckpointError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


def test_a_few_bytes_of_an_index_take_neither_memory_nor_time(tmp_path):
    """In a process of their own, which is ended when it takes long; by what it has touched of its memory, in MiB."""
    folders = [tmp_path / name.replace(" ", "_") for name in BOMBS]
    for folder, bomb in zip(folders, BOMBS.values(), strict=True):
        folder.mkdir()
        (folder / INDEX_FILE).write_bytes(bomb)
    words = [sys.executable, "-c", IN_LITTLE_MEMORY, *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr
    for line, folder in zip(lines, folders, strict=True):
        assert int(line.split()[0]) < 64 and f"{folder}/.metadata" in line


def test_an_error_about_an_index_stays_short(made, tmp_path):
    """What is said of a value is no longer than a line, though the value may stand for billions."""
    value = ()
    for _ in range(40):
        value = (value, value)
    content = (made / "ckpt" / INDEX_FILE).read_bytes()
    index = pickle.loads(content)
    next(iter(index.storage_data.values())).offset = value
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="for a shape or a place") as caught:
        read_metadata(tmp_path)
    assert len(str(caught.value)) < 1000

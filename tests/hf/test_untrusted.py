"""Checkpoints of unknown origin: what they hold does not run, and what they name lies in their folder."""

import os
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from cpt_mega.errors import CheckpointError
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.hf.torch_dist import read_index
from cpt_mega.hf.untrusted import first_refused, only_data, pickled_parts, read_metadata
from tests.helpers.hostile import COMMON, INDEX, OBJECT, PARTS, TENSOR, change_index, hostile_copy, payloads
from tests.helpers.models import tiny_llama

NAMES = ["posix.system", "builtins.exec", "builtins.getattr", "functools.partial", "torch.storage._load_from_bytes"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    tiny_llama(folder / "hf", num_hidden_layers=1)
    import_hf(folder / "hf", folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def hostile(checkpoint, tmp_path, part, name="posix.system"):
    return hostile_copy(checkpoint, tmp_path / "ckpt", part, payloads(tmp_path / "canary")[name])


def parts_of(folder, part):
    """A folder's pickled parts that lie in one of its files."""
    return [each for each in pickled_parts(folder) if each.file.name == PARTS[part]]


def content_of(part):
    with open(part.file, "rb") as stream:
        stream.seek(part.offset)
        return stream.read(part.length)


def write(path, content):
    path.write_bytes(content)
    return path


def test_an_index_is_read_as_torch_reads_it(checkpoint):
    ours, theirs = read_metadata(checkpoint), FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data


@pytest.mark.parametrize("name", NAMES)
def test_an_index_runs_nothing(checkpoint, tmp_path, canary, name):
    folder = hostile(checkpoint, tmp_path, INDEX, name)
    for read in (read_index, pickled_parts, lambda folder: export_hf(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=rf"\.metadata.*wants to load {name}.*do not load it"):
            read(folder)
    assert not canary.exists() and not (tmp_path / "out").exists()
    FileSystemReader(folder).read_metadata()
    assert canary.exists()  # as torch reads it, it does run


@pytest.mark.parametrize("part", [COMMON, OBJECT])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_tensor_runs_nothing(checkpoint, tmp_path, canary, part, name):
    folder = hostile(checkpoint, tmp_path, part, name)
    refused = first_refused(pickled_parts(folder))
    said = name.removeprefix("builtins.")  # torch leaves it out
    assert PARTS[part] in str(refused) and f"wants to load {said}" in str(refused) and "do not load it" in str(refused)
    export_hf(folder, tmp_path / "out")  # reads neither
    assert not canary.exists()
    (found,) = parts_of(folder, part)
    torch.load(write(tmp_path / "found", content_of(found)), weights_only=False)
    assert canary.exists()


def test_what_lies_in_a_tensors_place_runs_nothing(checkpoint, tmp_path, canary):
    folder = hostile(checkpoint, tmp_path, TENSOR)
    with pytest.raises(CheckpointError, match="a tensor cannot be read"):
        export_hf(folder, tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_what_no_restricted_unpickler_reads_is_refused(checkpoint, tmp_path):
    folder = hostile_copy(checkpoint, tmp_path / "ckpt", INDEX, None)
    (folder / PARTS[COMMON]).write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with warnings.catch_warnings(action="ignore"):
        assert "common.pt" in str(first_refused(pickled_parts(folder)))


@pytest.mark.parametrize("part", [INDEX, COMMON, OBJECT])
def test_a_file_that_is_swapped_while_core_loads_runs_nothing(checkpoint, tmp_path, canary, monkeypatch, part):
    """Core's own readers and ``weights_only=False``, within ``only_data``; and what was set is as it was before."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = hostile(checkpoint, tmp_path, part)
    before, plain = dict(os.environ), FileSystemReader.read_metadata
    with pytest.raises((CheckpointError, pickle.UnpicklingError), match=r"posix\.system"), only_data():
        if part == INDEX:
            FileSystemReader(str(folder)).read_metadata()
        else:
            (found,) = parts_of(folder, part)
            torch.load(write(tmp_path / "found", content_of(found)), weights_only=False)
    assert not canary.exists()
    assert dict(os.environ) == before and FileSystemReader.read_metadata is plain


def test_an_index_changes_no_class(checkpoint, tmp_path):
    """A pickle can write to a class that it names, without calling anything."""
    folder = hostile_copy(checkpoint, tmp_path / "ckpt", INDEX, None)
    writing = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x06\0\0\0poisonK\x01s\x86b."
    (folder / PARTS[INDEX]).write_bytes(writing)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(folder)
    assert not hasattr(MetadataIndex, "poison")
    pickle.loads(writing)
    assert MetadataIndex.poison == 1
    del MetadataIndex.poison


def place(**changes):
    """Changes the place of an index's first entry."""

    def change(index):
        key = next(iter(index.storage_data))
        index.storage_data[key] = replace(index.storage_data[key], **changes)

    return change


def tensor(**changes):
    """Changes an index's first tensor."""
    return lambda index: vars(next(iter(index.state_dict_metadata.values()))).update(changes)


def chunk(**changes):
    """Changes the first chunk of an index's first tensor."""
    return lambda index: vars(next(iter(index.state_dict_metadata.values())).chunks[0]).update(changes)


LIES = {
    "parent": (place(relative_path="../outside"), "not in the folder"),
    "parent within": (place(relative_path="hf/../../outside"), "not in the folder"),
    "absolute": (place(relative_path="/etc/passwd"), "not in the folder"),
    "no name": (place(relative_path=""), "not in the folder"),
    "number": (place(relative_path=7), "not in the folder"),
    "backslash": (place(relative_path="..\\outside"), "not in the folder"),
    "link": (place(relative_path="link"), "not in the folder"),
    "missing": (place(relative_path="__9_0.distcp"), "cannot be read"),
    "offset below": (place(offset=-1), "for a shape or a place"),
    "length below": (place(length=-1), "for a shape or a place"),
    "true for a number": (place(offset=True), "for a shape or a place"),
    "beyond": (place(offset=1 << 60), "names bytes"),
    "packed": (place(transform_descriptors=["zstd"]), "another format"),
    "size below": (tensor(size=(-1, 48)), "for a shape or a place"),
    "no dtype": (tensor(properties=None), "for a TensorProperties"),
    "chunk outside": (chunk(sizes=torch.Size([385, 48])), "has a chunk of"),
    "chunk of more": (chunk(sizes=torch.Size([384, 48, 1])), "cannot be read"),
    "chunk elsewhere": (chunk(offsets=torch.Size([1, 0]), sizes=torch.Size([1, 1])), "cannot be read"),
    "no object": (lambda index: vars(index).update(storage_data=3), "cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(checkpoint, tmp_path, lie):
    change, said = LIES[lie]
    (tmp_path / "outside").write_bytes(bytes(1 << 20))
    folder = hostile_copy(checkpoint, tmp_path / "ckpt", INDEX, None)
    (folder / "link").symlink_to(tmp_path / "outside")
    change_index(folder, change)
    with pytest.raises(CheckpointError, match=rf"\.metadata.*{said}"):
        read_metadata(folder)


def test_a_chunk_larger_than_its_bytes_takes_no_memory(checkpoint, tmp_path):
    def grow(index):
        for change in (tensor(size=torch.Size([1 << 40, 48])), chunk(sizes=torch.Size([1 << 40, 48]))):
            change(index)

    folder = hostile_copy(checkpoint, tmp_path / "ckpt", INDEX, None)
    change_index(folder, grow)
    with pytest.raises(CheckpointError, match=r"\.metadata.*takes \d+ bytes in"):
        read_metadata(folder)

"""Checkpoints that would run code in whoever loads them as torch and megatron-core do: they create a file."""

import functools
import io
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from cpt_mega.lineage import seal_folder

INDEX, COMMON, OBJECT, TENSOR = "index", "common", "object", "tensor"
# And the file that holds each.
PARTS = {INDEX: ".metadata", COMMON: "common.pt", OBJECT: "__0_0.distcp", TENSOR: "__0_0.distcp"}
_RNG = "rng_state/shard_0.0.0_1.1.1"
_NORM = "decoder.final_layernorm.weight"  # smaller than any payload


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self._reduced = function, arguments

    def __reduce__(self):
        return self._reduced


def payloads(canary: Path) -> dict[str, Call]:
    """Ways to create ``canary``, by the name that a refusal says."""
    saved = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), saved)
    return {
        "posix.system": Call(os.system, f"touch {canary}"),
        "builtins.exec": Call(exec, f"open({str(canary)!r}, 'w').close()"),
        "builtins.getattr": Call(canary.touch),
        "functools.partial": Call(functools.partial(open, str(canary), "w")),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, saved.getvalue()),
    }


def hostile_copy(checkpoint: Path, folder: Path, part: str, payload: object) -> Path:
    """A sealed copy of a checkpoint with a payload in one of PARTS; ``object`` is the generators', made where there is none."""
    shutil.copytree(checkpoint, folder)
    if part == COMMON:
        torch.save({"payload": payload}, folder / PARTS[COMMON])
    elif part == INDEX:
        change_index(folder, lambda index: setattr(index, "planner_data", payload))
    else:
        content = io.BytesIO()
        torch.save([payload], content)
        with open(folder / PARTS[OBJECT], "ab") as stream:
            place = _StorageInfo(PARTS[OBJECT], stream.tell(), len(content.getvalue()))
            stream.write(content.getvalue())
        change_index(folder, lambda index: (_add_object if part == OBJECT else _move_tensor)(index, place))
    seal_folder(folder)
    return folder


def change_index(folder: Path, change) -> None:
    """Writes a folder's index anew, after ``change(index)``. What was pickled is not looked at."""
    index = FileSystemReader(folder).read_metadata()
    change(index)
    (folder / PARTS[INDEX]).write_bytes(pickle.dumps(index))


def _add_object(index: Metadata, place: _StorageInfo) -> None:
    index.state_dict_metadata[_RNG] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(_RNG)] = place


def _move_tensor(index: Metadata, place: _StorageInfo) -> None:
    index.storage_data |= {key: place for key in index.storage_data if key.fqn == _NORM}

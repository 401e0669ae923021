"""Packing plans on disk, beside their corpus: made once, mapped into memory by every process and every later run.

A plan is a function of the documents' lengths, so its file is named by their digest and by how they were packed: a corpus
that changes gets another file. It appears under its name when it is whole. Processes of one machine wait for the one
that makes it; where a shared file system knows no locks, two machines may both make it, and put the same bytes there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cpt_mega.data.indexed import IndexedCorpus, plans_path
from cpt_mega.data.packing import PACKING_VERSION, PlanStatistics, RowPlan, plan_rows

KEPT_FROM_DOCUMENTS = 1 << 17  # packing fewer takes less than a tenth of a second
ARRAYS = ("row_offsets", "document", "start", "length")
LOCK = ".lock"
ABOUT = "about"


def open_plan(corpus: IndexedCorpus, seq_length: int, method: str) -> RowPlan:
    """The plan of a corpus, from its file or made and, if it is large, kept. Raises InputError as ``plan_rows`` does.

    Where nothing can be written beside the corpus, every process packs it for itself.
    """
    if corpus.documents < KEPT_FROM_DOCUMENTS:
        return plan_rows(corpus.document_lengths, seq_length, method)
    path = plans_path(corpus.prefix) / f"{method}.{seq_length}.{_digest(corpus, seq_length, method)}.safetensors"
    if (plan := _read(path, seq_length)) is not None:
        return plan
    with _one_at_a_time(path.parent):
        if (plan := _read(path, seq_length)) is None:  # not made by another process meanwhile
            plan = plan_rows(np.concatenate(list(corpus.length_blocks())), seq_length, method)
            with contextlib.suppress(OSError, SafetensorError):  # a folder that is not ours to write, or a full disk
                _write(plan, path)
    return plan


def _digest(corpus: IndexedCorpus, seq_length: int, method: str) -> str:
    digest = hashlib.sha256(f"{PACKING_VERSION} {method} {seq_length}".encode())
    for block in corpus.length_blocks():
        digest.update(block.astype("<i8"))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, as far as there can be one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(folder / LOCK, "a")), fcntl.LOCK_EX)
        yield


def _write(plan: RowPlan, path: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        about = {"seq_length": plan.seq_length, "statistics": asdict(plan.statistics), "sums": _sums(plan)}
        # one entry: several would come in another order each time, and equal plans are to be equal files
        save_file({name: getattr(plan, name) for name in ARRAYS}, unfinished, {ABOUT: json.dumps(about)})
        with open(unfinished, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _read(path: Path, seq_length: int) -> RowPlan | None:
    """A kept plan, mapped; None when there is none, or not a whole one."""
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > path.stat().st_size:
                return None
            header = json.loads(stream.read(size))
        about = json.loads(header["__metadata__"][ABOUT])
        arrays = {name: _mapped(path, 8 + size, header[name]) for name in ARRAYS}
        plan = RowPlan(about["seq_length"], **arrays, statistics=PlanStatistics(**about["statistics"]))
        return plan if plan.seq_length == seq_length and _sums(plan) == about["sums"] else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return None


def _sums(plan: RowPlan) -> dict[str, int]:
    """A quick look at every number: a disk that lost a block would train on other documents without a word."""
    return {name: int(getattr(plan, name).sum(dtype=np.int64)) for name in ARRAYS}


def _mapped(path: Path, begin: int, entry: dict) -> np.ndarray:
    dtype, (first, last) = np.dtype(f"<i{int(entry['dtype'][1:]) // 8}"), entry["data_offsets"]
    if first == last:
        return np.empty(0, dtype)
    # numpy refuses a file that is too short
    return np.memmap(path, dtype, "r", begin + first, tuple(entry["shape"]))

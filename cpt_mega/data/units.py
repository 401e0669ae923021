"""Which units the inputs of a corpus consist of, as a function of the inputs alone.

Neither the number of processes nor that of machines enters, so the units of one run are those of every other over the
same inputs: a stopped run goes on where it was, and shards are consecutive units.
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cpt_mega.data.readers import CompressedJsonl, FileGroup, JsonlRange, ParquetGroups, Unit
from cpt_mega.errors import InputError

# Small enough that the last ones keep all processes busy, large enough that a terabyte has few.
MOST_UNIT_BYTES, LEAST_UNIT_BYTES, UNITS_OF_SMALL_INPUTS = 32 << 20, 1 << 20, 64
MOST_FILES = 4096


@dataclass(frozen=True)
class Input:
    """A file, or a folder whose files are documents.

    Attributes:
        path: absolute.
        names: of the files of a folder, relative, sorted; empty for a file.
        sizes: bytes of each of them.
        bytes: in all.
        stamp: changes when a file is added, removed, resized or written to.
    """

    path: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    bytes: int
    stamp: str


def survey(paths: Sequence[str], include: Sequence[str] = ("*",)) -> list[Input]:
    """Looks at inputs; of folders, at the files whose names match one of the patterns of ``include``.

    Hidden files and folders are left out, and symbolic links within folders.
    Raises InputError when a path is not there, no reader takes it, or no file of a folder matches.
    """
    return [_survey_folder(path, include) if os.path.isdir(path) else _survey_file(path) for path in paths]


def plan_units(inputs: Sequence[Input]) -> list[Unit]:
    """All units, in the order their documents take in the corpus. Raises InputError for a file that is not what its
    suffix says."""
    total = sum(one.bytes for one in inputs)
    unit_bytes = min(max(total // UNITS_OF_SMALL_INPUTS, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)
    return [unit for index, one in enumerate(inputs) for unit in _planner(one)(index, one, unit_bytes)]


def shard_of(units: Sequence[Unit], index: int, shards: int) -> list[Unit]:
    """The consecutive units of shard ``index`` (from 0) of so many."""
    return list(units[index * len(units) // shards : (index + 1) * len(units) // shards])


def _survey_file(path: str) -> Input:
    if not os.path.isfile(path):
        raise InputError("--input", path, "no such file or folder")
    if not any(path.endswith(suffix) for suffix in PLANNERS):
        fix = f"give files that end in one of {', '.join(PLANNERS)}, or a folder, whose files are one document each"
        raise InputError("--input", path, fix)
    found = os.stat(path)
    return Input(os.path.abspath(path), (), (), found.st_size, f"{found.st_size} {found.st_mtime_ns}")


def _survey_folder(path: str, include: Sequence[str]) -> Input:
    names, sizes, stamp = [], [], hashlib.sha256()
    for name, found in sorted(_files_below(path)):
        if any(fnmatch.fnmatch(os.path.basename(name), pattern) for pattern in include):
            names.append(name)
            sizes.append(found.st_size)
            stamp.update(f"{found.st_size} {found.st_mtime_ns} ".encode() + os.fsencode(name) + b"\n")
    if not names:
        raise InputError("--input", path, f"the folder holds no file that matches {' '.join(include)}")
    return Input(os.path.abspath(path), tuple(names), tuple(sizes), sum(sizes), stamp.hexdigest())


def _files_below(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(where, name)
            if not name.startswith(".") and not os.path.islink(path):
                yield os.path.relpath(path, folder), os.stat(path)


def _plan_jsonl(source: int, one: Input, unit_bytes: int) -> Iterator[Unit]:
    for start in range(0, one.bytes, unit_bytes):
        yield JsonlRange(source, one.path, start, min(start + unit_bytes, one.bytes))


def _plan_compressed(source: int, one: Input, unit_bytes: int) -> Iterator[Unit]:
    yield CompressedJsonl(source, one.path, one.bytes)


def _plan_parquet(source: int, one: Input, unit_bytes: int) -> Iterator[Unit]:
    """Row groups together until their share of the file is a unit's; bytes are shared out by the groups' sizes."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(one.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError("--input", one.path, f"cannot be read as Parquet ({error}); write it again") from error
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    whole = max(sum(group.total_byte_size for group in groups), 1)
    start = first = row = rows = size = 0
    for index, group in enumerate(groups, 1):
        size, rows = size + group.total_byte_size, rows + group.num_rows
        stop = one.bytes * size // whole
        if stop - start >= unit_bytes or index == len(groups):
            yield ParquetGroups(source, one.path, start, stop, first, index, row)
            start, first, row = stop, index, rows


def _plan_folder(source: int, one: Input, unit_bytes: int) -> Iterator[Unit]:
    names, size = [], 0
    for name, bytes_of_it in zip(one.names, one.sizes, strict=True):
        names.append(name)
        size += bytes_of_it
        if size >= unit_bytes or len(names) == MOST_FILES or name == one.names[-1]:
            yield FileGroup(source, one.path, tuple(names), size)
            names, size = [], 0


def _plan_text(source: int, one: Input, unit_bytes: int) -> Iterator[Unit]:
    folder, name = os.path.split(one.path)
    yield FileGroup(source, folder, (name,), one.bytes)


def _planner(one: Input) -> Callable[[int, Input, int], Iterator[Unit]]:
    if one.names:
        return _plan_folder
    return next(planner for suffix, planner in PLANNERS.items() if one.path.endswith(suffix))


PLANNERS: dict[str, Callable[[int, Input, int], Iterator[Unit]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _plan_jsonl),
    **{f"{kind}.{packed}": _plan_compressed for kind in (".jsonl", ".ndjson", ".json") for packed in ("gz", "zst")},
    ".parquet": _plan_parquet,
    **dict.fromkeys((".txt", ".md"), _plan_text),
}

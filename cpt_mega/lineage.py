"""What a file, a folder or a piece of code is called: digests, seals and versions.

A sealed folder lists every file with its size and SHA-256 in ``manifest.json`` and ends with an empty ``COMPLETE``,
written last. A folder without ``COMPLETE`` does not exist for any reader of this project.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from cpt_mega import __version__
from cpt_mega.errors import CheckpointError

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
_LONGEST_NAME = 255  # of a file, in all common file systems
_DEEPEST_JSON = 64  # of values within values: nothing that is written here comes near
_BUILDING = ".building-"


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex. Raises OSError when it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a string's UTF-8 bytes, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def combined_digest(digests: Sequence[str]) -> str:
    """One digest for several in order; that of a single one is itself."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def files_digest(folder: str | os.PathLike, names: Iterable[str]) -> str:
    """One digest over named files of a folder: names and contents, in sorted order."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{file_digest(Path(folder) / name)}\0".encode())
    return total.hexdigest()


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part of it."""
    path = Path(path)
    stream = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
    try:
        with stream:
            json.dump(value, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, path)
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk what was begun would stay there and take room
            os.unlink(stream.name)
        raise


def is_local_name(name: object) -> bool:
    """Whether a name that a file gives for another means a file in or below its own folder, links aside."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    parts = name.split("/")  # a leading slash gives an empty one
    return length <= _LONGEST_NAME and not {"", ".", ".."} & set(parts)


def is_inside(folder: str | os.PathLike, name: object) -> bool:
    """``is_local_name``, and no link on the way leads out of the folder."""
    return is_local_name(name) and (Path(folder) / name).resolve().is_relative_to(Path(folder).resolve())


def read_json(path: str | os.PathLike) -> object:
    """What a JSON file holds. Raises OSError, and ValueError as ``parse_json`` does."""
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str) -> object:
    """A JSON document. Raises ValueError, also for one nested so deeply that who walks through it may run out of stack."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(_DEEPEST_JSON + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def folder_files(folder: str | os.PathLike) -> list[str]:
    """Relative names of every file under a folder that a seal covers, sorted."""
    folder = Path(folder)
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, COMPLETE))


def measure_files(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, dict]:
    """``{name: {"bytes", "sha256"}}`` for files of a folder."""
    folder = Path(folder)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in names}


def seal_folder(folder: str | os.PathLike, measured: Mapping[str, dict] | None = None) -> None:
    """Writes ``manifest.json`` and then ``COMPLETE``.

    Args:
        folder: the folder whose files are all in place.
        measured: sizes and digests when they were taken elsewhere (several ranks share the work).
    """
    folder = Path(folder)
    files = measured or measure_files(folder, folder_files(folder))
    write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})  # measured in any order
    with open(folder / COMPLETE, "w") as stream:
        os.fsync(stream.fileno())
    flush_folder(folder)


def put_into_sealed_folder(folder: str | os.PathLike, name: str, write: Callable[[Path], None]) -> None:
    """Adds a file to a sealed folder and to its seal, or puts another in its place; all other files stay as they are.

    Args:
        name: of a file that stands in the folder itself.
        write: makes the file at the path that it is given.

    Killed in the middle, the folder is whole but for a file that its seal does not name; the same call mends that. Raises
    CheckpointError when the folder is not sealed, OSError when nothing can be written there.
    """
    folder = Path(folder)
    files, building = sealed_files(folder), folder / f".{name}.building"
    try:
        write(building)
        os.chmod(building, 0o644)
        if files.pop(name, None) is not None:  # never a seal over what it is not of
            write_json(folder / MANIFEST, {"files": files})
        os.replace(building, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        raise
    files |= measure_files(folder, [name])
    write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})
    flush_folder(folder)


def flush_folder(folder: str | os.PathLike) -> None:
    """Has the names in a folder on the disk, so that a power cut does not take back a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not every file system does it for folders
            raise
    finally:
        os.close(descriptor)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a folder was sealed."""
    return (Path(folder) / COMPLETE).is_file() and (Path(folder) / MANIFEST).is_file()


def sealed_files(folder: str | os.PathLike) -> dict[str, dict]:
    """The manifest of a sealed folder.

    Raises CheckpointError when it is not sealed, cannot be read, or names a file that is not in the folder.
    """
    folder = Path(folder)
    if not is_complete(folder):
        raise CheckpointError("checkpoint", str(folder), "not a complete checkpoint (no COMPLETE file); name another")
    try:
        files = read_json(folder / MANIFEST)["files"]
        sealed = {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError("checkpoint", str(folder / MANIFEST), f"the manifest cannot be read ({error})") from error
    outside = next((name for name in sealed if not is_inside(folder, name)), None)
    if outside is not None:
        raise CheckpointError("checkpoint", str(folder / MANIFEST), f"names {outside!r}, which is not in the folder")
    return sealed


def damaged_files(folder: str | os.PathLike, files: Mapping[str, dict]) -> list[str]:
    """Names among ``files`` that are missing or whose size or digest is not what the seal says."""
    folder = Path(folder)

    def differs(name: str, expected: dict) -> bool:
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return True
        return file_digest(path) != expected["sha256"]

    return [name for name, expected in files.items() if differs(name, expected)]


@contextlib.contextmanager
def building_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder beside ``target``; sealed and renamed to it on success, removed on any error.

    What a process that was killed left of the same target is removed first.

    Raises CheckpointError when ``target`` exists and is not an empty folder: nothing is ever overwritten.
    """
    import shutil

    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError("output", str(target), "already exists and is not empty; remove it or name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(target)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_BUILDING}{target.name}-"))
    os.chmod(building, 0o755)
    held = _held(building)
    try:
        yield building
        if target.is_dir():
            target.rmdir()
        os.rename(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def _held(building: Path) -> int | None:
    """A lock on a folder that ends with this process, as an open descriptor; None when another has it, or none can be had.

    A file system that knows no such lock for folders (NFS) gives none to anybody: nothing is then taken for left over.
    """
    descriptor = None
    try:
        descriptor = os.open(building, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_left_over(target: Path) -> None:
    import shutil

    name = re.compile(re.escape(f"{_BUILDING}{target.name}-") + "[a-z0-9_]{8}")
    for folder in [path for path in target.parent.iterdir() if name.fullmatch(path.name)]:
        held = _held(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def new_run_id() -> str:
    """A name for a run that no other run has."""
    return uuid.uuid4().hex[:12]


def code_version() -> dict:
    """``{"version", "commit", "dirty"}`` of this code; commit is None outside a git checkout."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": __version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def library_versions(
    names: Iterable[str] = ("torch", "megatron-core", "transformer-engine", "numpy", "safetensors"),
) -> dict:
    """Installed versions by package name; packages that are absent are left out."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

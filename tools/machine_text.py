"""Real text that any machine with this project installed has: Python source code, and the prose of docstrings.

The quickstart and the benchmarks take their corpora from here: nothing is downloaded. Documents come in an order that is a
pure function of their content, so two machines with the same packages get the same corpora.
"""

import ast
import gzip
import hashlib
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

TEXT_ROOTS = ("/usr/share", "/usr/include", "/usr/lib", "/usr/local", "/usr/src", "/opt", "/etc")
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for words in (
        "c cc cpp cu cuh el go h hip hpp inl java js lua pl pm py pyi pyx rb rs sh tcl ts",  # code
        "1 3 5 7 8 html md rst tex txt",  # manual pages and documentation
        "cfg css ini json po svg toml xml yaml yml",  # data
    )
    for suffix in words.split()
)
LARGEST_TEXT_BYTES, LEAST_TEXT_BYTES = 20_000_000, 200
_LEFT_OUT = {
    "test",
    "tests",
    "encodings",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "turtledemo",
}


def python_sources() -> Iterator[str]:
    """Source files of the Python standard library, one document a file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _python_files(root):
        yield from _text_of(path)


def docstring_prose(packages: Iterable[str] = ("numpy", "torch", "transformers")) -> Iterator[str]:
    """Docstrings of installed packages that read as prose, one document a docstring, each text once.

    Parsing is what takes time, so it goes on only as long as documents are taken.
    """
    seen: set[bytes] = set()
    for package in packages:
        for path in _python_files(Path(sysconfig.get_paths()["purelib"]) / package):
            for text in _docstrings(path):
                digest = hashlib.sha256(text.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield text


def distinct_texts(limit_bytes: int) -> Iterator[str]:
    """Text files of this machine, each content once, until their sizes reach a limit: code, manual pages, documentation, data.

    What they are depends on what is installed, so no two machines give the same: for measurements alone.
    """
    seen: set[bytes] = set()
    roots = dict.fromkeys([*TEXT_ROOTS, sys.base_prefix, sys.prefix])
    for path in (path for root in roots for path in _text_files(Path(root))):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode()
        except (OSError, EOFError, UnicodeDecodeError, zlib.error):
            continue
        digest = hashlib.sha256(raw).digest()
        if len(raw) < LEAST_TEXT_BYTES or digest in seen:
            continue
        seen.add(digest)
        yield text
        limit_bytes -= len(raw)
        if limit_bytes <= 0:
            return


def _text_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in (Path(folder, name) for name in sorted(names)):
            suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
            if suffix in TEXT_SUFFIXES and not path.is_symlink() and path.stat().st_size <= LARGEST_TEXT_BYTES:
                yield path


def take_bytes(documents: Iterable[str], limit_bytes: int) -> list[str]:
    """Documents until their UTF-8 sizes reach a limit, in an order by content digest."""
    taken, size = [], 0
    for text in documents:
        taken.append(text)
        size += len(text.encode())
        if size >= limit_bytes:
            break
    return sorted(taken, key=lambda text: hashlib.sha256(text.encode()).digest())


def without_runs_of(texts: Iterable[str], held_out: Iterable[str], words: int = 8) -> list[str]:
    """Those that share no run of so many words with what is held out: docstrings and licences are copied from file to file."""
    known = {run for text in held_out for run in _runs(text, words)}
    return [text for text in texts if known.isdisjoint(_runs(text, words))]


def _runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    parts = text.split()
    return zip(*(parts[start:] for start in range(words)), strict=False)


def _python_files(root: Path) -> list[Path]:
    """Files below a folder in a scattered but fixed order, so that a prefix of them is a fair sample."""
    found = (path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts[:-1]))
    return sorted(found, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


def _text_of(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a few files of the library are in other encodings on purpose
        return
    if 500 <= len(text) <= 60_000:  # blank files say nothing, and one giant would be half of a small held-out set
        yield text


def _docstrings(path: Path) -> Iterator[str]:
    for text in _text_of(path):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= 300 and docstring.count(">>>") < 3:
                    yield docstring

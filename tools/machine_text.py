"""Real text that any machine with this project installed has: Python source code, and the prose of docstrings.

The quickstart and the benchmarks take their corpora from here: nothing is downloaded. Documents come in an order that is a
pure function of their content, so two machines with the same packages get the same corpora.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def take_bytes(documents: Iterable[str], limit_bytes: int) -> list[str]:
    """Documents until their UTF-8 sizes reach a limit, in an order by content digest."""
    taken, size = [], 0
    for text in documents:
        taken.append(text)
        size += len(text.encode())
        if size >= limit_bytes:
            break
    return sorted(taken, key=lambda text: hashlib.sha256(text.encode()).digest())


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

"""The house: rooms import only from floors below, and megatron-core is touched in one room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"errors", "lineage", "json_types", "parent", "config", "command_line"},
    {"data", "hf"},
    {"engine"},
    {"checkpoint", "gates"},
    {"loop"},
    {"train", "score", "launch"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "cpt_mega").rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "cpt_mega").parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | (
                {f"cpt_mega.{a.name}" for a in node.names} if node.module == "cpt_mega" else set()
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = _room(path)
    if room == "__init__":
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "cpt_mega" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != room:
            same_level = {room, parts[1]} <= FLOORS[0] or {room, parts[1]} == {"score", "train"}
            assert LEVEL[parts[1]] < LEVEL[room] or same_level, f"{path} imports {name}"
        assert parts[0] != "megatron" or room == "engine", f"{path} imports {name}"
        assert not name.startswith("megatron.training"), f"{path} imports {name}"


def test_every_room_is_on_a_floor():
    assert {_room(path) for path in FILES} - {"__init__"} == set(LEVEL)


def test_the_code_is_formatted_and_lints():
    for words in (("check", "."), ("format", "--check", ".")):
        done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

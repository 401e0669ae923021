"""Seals, and the names that files give for others."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cpt_mega.errors import CheckpointError
from cpt_mega.lineage import (
    MANIFEST,
    building_folder,
    damaged_files,
    folder_files,
    is_inside,
    is_local_name,
    put_into_sealed_folder,
    read_json,
    seal_folder,
    sealed_files,
)


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text("{}")
    seal_folder(folder)
    return folder


@pytest.mark.parametrize("name", ["a", ".metadata", "hf/config.json", "a..b", "...", "a b"])
def test_names_of_files_below_a_folder(tmp_path, name):
    assert is_local_name(name) and is_inside(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/..", "a/../../b", "/a", "//a", "a//b", "a/", "./a", "..\\a", "C:\\a", "a\0", None, 3],
)
def test_names_of_anything_else(tmp_path, name):
    assert not is_local_name(name) and not is_inside(tmp_path, name)


def test_a_link_leads_out_or_not(tmp_path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "out").symlink_to(tmp_path)
    (tmp_path / "folder" / "in").symlink_to("a")
    (tmp_path / "link").symlink_to("folder")
    assert is_local_name("out/a") and not is_inside(tmp_path / "folder", "out/a")
    assert is_inside(tmp_path / "folder", "in/x") and is_inside(tmp_path / "link", "in/x")


def test_a_seal_is_read(sealed):
    assert sealed_files(sealed).keys() == {"hf/config.json"}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "hf/../../x", "", "..\\x", "link"])
def test_a_seal_names_no_file_outside(sealed, name):
    (sealed / "link").symlink_to("/etc/passwd")
    files = json.loads((sealed / MANIFEST).read_text())["files"]
    (sealed / MANIFEST).write_text(json.dumps({"files": files | {name: files["hf/config.json"]}}))
    with pytest.raises(CheckpointError, match=r"manifest.json.*not in the folder"):
        sealed_files(sealed)


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"files": {"a": {"bytes": 1e999, "sha256": ""}}}', "\xff"]
)
def test_a_seal_that_cannot_be_read_is_named(sealed, content):
    (sealed / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"manifest.json.*cannot be read"):
        sealed_files(sealed)


def test_json_nested_without_end_is_an_error_of_the_value(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested"):
        read_json(tmp_path / "a.json")


def test_what_a_killed_process_left_is_removed_and_what_is_being_made_is_not(tmp_path):
    """Of the same target alone."""
    script = "import os, sys; from cpt_mega.lineage import building_folder\n"
    script += "with building_folder(sys.argv[1]): os.kill(os.getpid(), 9)"
    for name in ("out", "out-other"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)], env={**os.environ, "PYTHONPATH": "."}
        )
        assert done.returncode == -signal.SIGKILL
    with building_folder(tmp_path / "out") as folder:
        with pytest.raises(ZeroDivisionError), building_folder(tmp_path / "out"):
            raise ZeroDivisionError
        left = [path.name for path in tmp_path.iterdir() if path != folder]
        assert folder.is_dir() and [name.startswith(".building-out-other-") for name in left] == [True]
    assert (tmp_path / "out").is_dir()


def test_a_file_is_put_into_a_sealed_folder_and_replaced(sealed):
    before = sealed_files(sealed)
    for text in ("one", "another"):
        put_into_sealed_folder(sealed, "more", lambda path, text=text: path.write_text(text))
        assert (sealed / "more").read_text() == text
        files = sealed_files(sealed)
        assert list(files) == ["hf/config.json", "more"] == folder_files(sealed) and not damaged_files(sealed, files)
    assert {name: files[name] for name in before} == before


@pytest.mark.parametrize("moment", range(1, 4))
def test_killed_while_a_file_is_put_in_the_folder_is_whole_and_the_same_call_mends_it(sealed, monkeypatch, moment):
    """At each rename that the call makes: of the seal without it, of the file, of the seal with it."""
    put_into_sealed_folder(sealed, "more", lambda path: path.write_text("one"))
    rename, done = os.replace, []

    def killed(source, target):
        done.append(target)
        if len(done) == moment:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_into_sealed_folder(sealed, "more", lambda path: path.write_text("another"))
    monkeypatch.undo()
    assert not damaged_files(sealed, sealed_files(sealed))
    put_into_sealed_folder(sealed, "more", lambda path: path.write_text("another"))
    assert (sealed / "more").read_text() == "another" and list(sealed_files(sealed)) == folder_files(sealed)

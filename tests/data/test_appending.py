import errno
import os
from contextlib import closing

import numpy as np
import pytest

from cpt_mega.data import appending
from cpt_mega.data.appending import BLOCK_BYTES, BUFFER_BYTES, AppendedFile

SIZES = (1, 0, BLOCK_BYTES - 1, 17, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, BUFFER_BYTES, 5, BUFFER_BYTES + BLOCK_BYTES - 1)


def pieces(tmp_path, sizes=SIZES):
    random = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        path = tmp_path / f"piece{index}"
        path.write_bytes(random.bytes(size))
        yield path


def append_all(path, some):
    with closing(AppendedFile(path, 0)) as file:
        for piece in some:
            file.append(piece)
        file.finish()


def test_it_holds_one_file_behind_the_other(tmp_path):
    some = list(pieces(tmp_path))
    append_all(tmp_path / "all", some)
    assert (tmp_path / "all").read_bytes() == b"".join(piece.read_bytes() for piece in some)


def test_abandoned_after_any_piece_it_holds_all_of_it_and_goes_on_from_there(tmp_path):
    """As after kill -9: nothing is finished. What was appended beyond the size that counts is cut off."""
    path, whole = tmp_path / "all", b""
    for piece in pieces(tmp_path):
        with closing(AppendedFile(path, len(whole))) as file:
            file.append(piece)
            whole += piece.read_bytes()
            assert path.read_bytes().rstrip(b"\0") == whole.rstrip(b"\0") and path.stat().st_size >= len(whole)
            file.append(tmp_path / "piece0")  # more than will be said to count
    with closing(AppendedFile(path, len(whole))) as file:
        file.finish()
    assert path.read_bytes() == whole


def refuses_to_open(monkeypatch):
    really = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes here")
        return really(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)


def refuses_to_write(monkeypatch):
    really, refused = os.pwrite, []

    def refuse(descriptor, data, at):
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "no direct writes here")
        return really(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", refuse)


def writes_little(monkeypatch):
    really = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: really(descriptor, data[:BLOCK_BYTES], at))


@pytest.mark.parametrize("kind", [refuses_to_open, refuses_to_write, writes_little], ids=lambda kind: kind.__name__)
def test_a_file_system_that_does_otherwise(tmp_path, monkeypatch, kind):
    some = list(pieces(tmp_path))
    kind(monkeypatch)
    append_all(tmp_path / "all", some)
    assert (tmp_path / "all").read_bytes() == b"".join(piece.read_bytes() for piece in some)


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(appending.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        append_all(tmp_path / "all", pieces(tmp_path))
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        AppendedFile(tmp_path / "nowhere" / "all", 0)

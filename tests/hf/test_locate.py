"""A run, its checkpoints folder, an iteration, an import: which sealed folder each path means."""

import pytest

from cpt_mega.errors import CheckpointError
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.lineage import seal_folder


def sealed(folder):
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    seal_folder(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    for iteration in (100, 20, 1000):
        sealed(tmp_path / "checkpoints" / f"iter_{iteration:07d}")
    (tmp_path / "checkpoints" / "iter_0002000").mkdir()  # interrupted
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    return tmp_path


def test_newest_complete(run):
    newest = run / "checkpoints" / "iter_0001000"
    assert locate_checkpoint(run) == locate_checkpoint(run / "checkpoints") == locate_checkpoint(newest) == newest
    assert locate_checkpoint(str(run / "checkpoints" / "iter_0000020")).name == "iter_0000020"


def test_import(tmp_path):
    assert locate_checkpoint(sealed(tmp_path / "import")) == tmp_path / "import"


def test_refusals(run, tmp_path_factory):
    with pytest.raises(CheckpointError, match="no such folder"):
        locate_checkpoint(run / "nothing")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        locate_checkpoint(run / "checkpoints" / "iter_0002000")
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(CheckpointError, match="model.checkpoint = .*not a complete checkpoint"):
        locate_checkpoint(other, field="model.checkpoint")
    (other / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no iter_"):
        locate_checkpoint(other)
    (other / "checkpoints" / "iter_0000001").mkdir()
    with pytest.raises(CheckpointError, match="none of them complete"):
        locate_checkpoint(other)
    seal_folder(other / "checkpoints" / "iter_0000001")
    with pytest.raises(CheckpointError, match="holds no model.json"):
        locate_checkpoint(other)

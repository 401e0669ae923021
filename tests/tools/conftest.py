"""Runs that the tools for checkpoints look at: made once, never written to; tests that damage something copy it."""

import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpt_mega.lineage import is_complete

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass(frozen=True)
class Runs:
    """``first`` from the import; ``second`` from its oldest checkpoint; ``third`` from ``second``, which moved afterwards."""

    folder: Path
    base: Path

    def checkpoints(self, name: str) -> list[Path]:
        """Complete ones of a run, oldest first."""
        return [path for path in sorted(self.folder.glob(f"{name}/checkpoints/iter_*")) if is_complete(path)]

    def state(self, name: str, which: int = -1) -> dict:
        return json.loads((self.checkpoints(name)[which] / "trainer_state.json").read_text())


@pytest.fixture(scope="session")
def runs(workers, jobsite, tmp_path_factory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"), Path(jobsite.checkpoint))
    short = ["train.tokens=300", "schedule.warmup_tokens=0", "restore.mode=weights"]

    def train(name: str, *words: str) -> None:
        workers(1).run("train", config=jobsite.config, overrides=[f"run.dir={made.folder / name}", *words])

    looked = ["eval.interval_tokens=500", "gates.general_perplexity_limit=100"]
    train("first", "train.tokens=1000", "checkpoint.interval_tokens=400", *looked)
    train("second", f"model.checkpoint={made.checkpoints('first')[0]}", *short)
    train("third", f"model.checkpoint={made.folder / 'second'}", *short)
    (made.folder / "moved").mkdir()
    shutil.move(made.folder / "second", made.folder / "moved" / "second")
    return made


@pytest.fixture
def checkpoint_tool(monkeypatch, capsys):
    """Runs a tool within this process, which has torch already: ``(exit code, standard output, standard error)``."""

    def run(name, *arguments):
        monkeypatch.setenv("COLUMNS", "250")  # paths of test folders are long
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run

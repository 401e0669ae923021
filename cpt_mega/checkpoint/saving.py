"""How a checkpoint comes about: written under a temporary name by all ranks, proved, sealed, renamed, named in the tracker.

The proof is of content. Fingerprints of the live tensors are taken when the save begins; what then stands on disk is read
back, and a tensor that is stale, torn or misplaced shows before anybody can restore from it. Core alone would not do: it
checks nothing (most single flipped bits load without a word), overwrites a folder in place, and its staging copies nothing
that already is in the host's memory. Beside the training all this happens in forked processes, which keep the memory as it was.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cpt_mega.checkpoint.background import ForkedCall, ThreadedCall
from cpt_mega.checkpoint.store import iteration_name, set_tracker
from cpt_mega.checkpoint.trainer_state import FORMAT, STATE_FILE, TrainerState
from cpt_mega.engine.state import EngineSave, model_fingerprints
from cpt_mega.engine.step import Engine
from cpt_mega.errors import FaultError, SaveStalled
from cpt_mega.hf.fingerprint import Fingerprint, added
from cpt_mega.hf.locate import CHECKPOINTS
from cpt_mega.hf.model_info import copy_model_files
from cpt_mega.hf.torch_dist import read_index
from cpt_mega.hf.weights import FINGERPRINTS, ModelNames, stored_fingerprints
from cpt_mega.lineage import flush_folder, folder_files, measure_files, seal_folder, write_json

_BUILDING = ".building-"
_LOOK_S = 0.01
_OPTIMIZER_BYTES = 12  # of a parameter: master weight and two moments in float32


class CheckpointSave:
    """One checkpoint on its way. Every rank makes one at the same step, and calls ``proceed`` until it gives the folder.

    Args:
        run_dir: the run folder.
        engine: weights, optimizer and generators, which may change as soon as this returns, unless the caller waits.
        state: goes into ``trainer_state.json``; must be equal on all ranks.
        model_files: a folder whose ``model.json`` and ``hf/`` are copied, so that each checkpoint can be exported alone.
        names: of the model.
        waits: whether the caller changes nothing until it has the folder. Otherwise this forks when it is made and at
            ``proceed``, and no thread of the caller's may be at work then.

    Raises FaultError, on all ranks, when the disk has no room for it or the folder cannot be made.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        state: TrainerState,
        model_files: Path,
        names: ModelNames,
        waits: bool,
    ):
        self.step, self.kind, self._mesh, self._names = state.step, state.kind, engine.mesh, names
        self._beside = ThreadedCall if waits else ForkedCall
        self._root = run_dir / CHECKPOINTS
        # A killed run's writer may still be at work, in a folder of its own.
        token = self._mesh.share(uuid.uuid4().hex[:8])
        self._building = self._root / f"{_BUILDING}{iteration_name(state.step)}-{token}"
        size = names.parameters * (engine.parameter_bytes + _OPTIMIZER_BYTES)
        self._on_main(lambda: _make_folder(self._building, size))
        self._save: EngineSave | None = EngineSave(engine, self._building, names)
        self._state = asdict(state)  # a copy: the run goes on
        self._live: dict[str, Fingerprint] = {}
        self._on_main(lambda: copy_model_files(model_files, self._building))
        self._call = self._beside(self._save.write)

    def is_ready(self) -> bool:
        """Whether ``proceed`` need not wait on any rank. A collective."""
        return not max(self._mesh.agree_max([int(self._call.is_running)]))

    def proceed(self) -> Path | None:
        """Waits for what is under way, and begins what comes after it; gives the folder when it is sealed. A collective.

        Raises FaultError, on all ranks, when it could not be written or is not what the run had: it is no checkpoint then;
        SaveStalled when a forked process came to a standstill, which says nothing against the disk or the run.
        """
        while not self.is_ready():  # no rank waits in one collective for as long as another writes
            time.sleep(_LOOK_S)
        outcome = self._outcome()
        if self._save is None:
            return self._seal(self._mesh.gather(outcome))
        self._save.finish(outcome)
        self._save = None  # and with it what was staged
        live = self._mesh.gather(outcome.fingerprints)
        self._on_main(lambda: self._write_state(added(live)))
        self._call = self._beside(self._proof())
        return None

    def to_its_end(self) -> Path:
        """The sealed folder, waited for. A collective; raises FaultError as ``proceed`` does."""
        while (path := self.proceed()) is None:
            pass
        return path

    def abandon(self) -> None:
        """Ends what is still under way. The folder was never sealed, so it is no checkpoint; the next start removes it."""
        self._call.stop()

    def _on_main(self, work: Callable[[], object]) -> object:
        """What rank 0's work returns, on every rank. Raises FaultError on all of them when it could not be done."""
        found, problem = None, None
        if self._mesh.is_main:
            try:
                found = work()
            except (OSError, FaultError) as error:
                problem = str(error)
        self._refuse(problem)
        return self._mesh.share(found)

    def _outcome(self) -> object:
        """What this rank's work returned. Raises FaultError on all ranks when that of any failed."""
        value, problem = self._call.outcome()
        problems = self._mesh.gather(problem and f"{problem}, on rank {self._mesh.rank}")
        stalled = max(self._mesh.agree_max([int(self._call.stands_still)]))
        self._refuse(next(filter(None, problems), None) if problems else None, SaveStalled if stalled else FaultError)
        return value

    def _refuse(self, problem: str | None, kind: type[FaultError] = FaultError) -> None:
        """Raises it on all ranks when rank 0 has a problem."""
        problem = self._mesh.share(problem)
        if problem is not None:
            raise kind(f"the checkpoint of step {self.step} was not made ({problem}); the one before it is intact")

    def _write_state(self, live: dict[str, Fingerprint]) -> None:
        self._live = live
        self._state["lineage"]["weights"] = self._names.digest(live)
        write_json(self._building / STATE_FILE, {"format": FORMAT, **self._state})

    def _proof(self) -> Callable[[], tuple[dict, dict]]:
        """This rank's share of reading back: sizes and digests of files, fingerprints of tensors."""
        mesh, folder, names = self._mesh, self._building, self._names
        share = (mesh.rank, mesh.world)
        files = self._on_main(lambda: folder_files(folder))[mesh.rank :: mesh.world]

        def prove() -> tuple[dict, dict]:
            return measure_files(folder, files), stored_fingerprints(folder, read_index(folder), names, share)

        return prove

    def _seal(self, outcomes: list | None) -> Path:
        """Rank 0 compares what was read back with what the run had, and gives the folder its name."""
        problem = None
        if outcomes is not None:
            problem = _difference(self._live, added(fingerprints for _, fingerprints in outcomes))
        self._refuse(problem)
        final = self._root / iteration_name(self.step)
        self._on_main(lambda: self._name_it(final, outcomes))
        return final

    def _name_it(self, final: Path, outcomes: list) -> None:
        measured = {name: entry for files, _ in outcomes for name, entry in files.items()}
        write_json(self._building / FINGERPRINTS, {name: str(one) for name, one in sorted(self._live.items())})
        seal_folder(self._building, measured | measure_files(self._building, [FINGERPRINTS]))
        shutil.rmtree(final, ignore_errors=True)  # the same step saved again, after a restart from an older one
        os.rename(self._building, final)
        set_tracker(self._root, self.step)
        flush_folder(self._root)  # before an older one may go


def _make_folder(building: Path, size: int) -> None:
    """Raises FaultError when ``size`` bytes are not there."""
    building.mkdir(parents=True)
    free = shutil.disk_usage(building).free
    if free < size:
        words = f"a checkpoint needs {size / 2**30:.2f} GiB and {building.parent} has {free / 2**30:.2f} GiB free: make"
        raise FaultError(f"{words} room, then the same command goes on")


def weights_name(engine: Engine, names: ModelNames) -> str:
    """The name of the model that an engine holds, whatever its layout; that of its HF export too. A collective."""
    parts = engine.mesh.gather(model_fingerprints(engine, names))
    return engine.mesh.share(names.digest(added(parts)) if parts else None)


def remove_unfinished(run_dir: Path) -> list[str]:
    """Removes what killed runs left half written; returns the names. Only the owner of the run folder may call it."""
    left = sorted((run_dir / CHECKPOINTS).glob(f"{_BUILDING}*"))
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in left]


def _difference(live: dict[str, Fingerprint], stored: dict[str, Fingerprint]) -> str | None:
    """The first tensor that is not on disk as the run had it."""
    for name in sorted(live.keys() | stored.keys()):
        if live.get(name) != stored.get(name):
            return f"tensor {name} is not on disk as the run had it: stale, torn or misplaced"
    return None

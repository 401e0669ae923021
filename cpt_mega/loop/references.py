"""What a run keeps of the model that it began with, to measure drift by: one file a probe in ``run.dir/references``.

A file is named by the probe and its digest, so other items never meet it. It is made once, at the look that takes the probe's
baseline, and cannot be made again later: the model is another by then.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cpt_mega.engine.step import Engine
from cpt_mega.errors import FaultError, InputError
from cpt_mega.gates.probes.drift import Drift
from cpt_mega.gates.requests import Likeliest
from cpt_mega.gates.suite import Suite, take_references

FOLDER = "references"


def references(
    engine: Engine, suite: Suite, folders: Sequence[Path], known: Collection[str], stops: Callable[[], bool]
) -> dict[str, Likeliest]:
    """Those of a suite's drift probes: read where there are any, taken of the model as it is where there are none yet.

    Args:
        folders: the run's own, and others where a file may lie: that of the run whose baseline was taken over.
        known: digests of probes whose baseline has been taken: their files must be there.

    A collective. Raises InputError for a file that is gone or damaged, FaultError for one that cannot be written, and
    Interrupted as ``take_look``.
    """
    found = {}
    for drift in suite.drifts:
        digest = suite.digests[drift.name]
        paths = [folder / FOLDER / f"{drift.name}-{digest[:16]}.safetensors" for folder in folders]
        taken = None
        if digest not in known:
            taken = take_references(engine, [drift], suite.row_tokens, stops)[drift.name]
        found[drift.name] = _of_main(
            engine, partial(_kept, paths, taken, drift)
        )  # as on disk, also where it was just taken
    return found


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent


def _of_main(engine: Engine, work: Callable[[], Likeliest]) -> Likeliest:
    """What the main process gets, on all of them; what goes wrong there is raised on all of them."""
    found: Likeliest | Exception | None = None
    if engine.mesh.is_main:  # alone: others may see its files sooner or later
        try:
            found = work()
        except InputError as error:
            found = error
        except OSError as error:
            found = FaultError(
                f"{FOLDER} cannot be written ({error.strerror}): mend that, then the same command goes on"
            )
    found = engine.mesh.share(found)
    if isinstance(found, Exception):
        raise found
    return found


def _kept(paths: Sequence[Path], taken: Likeliest | None, drift: Drift) -> Likeliest:
    """Keeps what was taken in the first place; or has it there already, or copies it from another."""
    own = paths[0]
    other = next((path for path in paths[1:] if path.is_file()), None)
    if taken is not None:
        _write(own, taken)
    elif other is not None and not own.is_file():
        _copy(other, own)
    return _read(own, drift)


def _write(path: Path, taken: Likeliest) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".building")
    save_file({"ids": taken.ids.astype(np.int32), "logprobs": taken.logprobs.astype(np.float32)}, building)
    building.replace(path)


def _copy(path: Path, to: Path) -> None:
    """A run has its own: the one that it began from may be gone tomorrow."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to.with_suffix(".building"))
    to.with_suffix(".building").replace(to)


def _read(path: Path, drift: Drift) -> Likeliest:
    fix = "is needed to measure the drift from where the run began; bring it back, or name the probe otherwise"
    try:
        values = load_file(path)
        ids, logprobs = values["ids"].astype(np.int64), values["logprobs"].astype(np.float64)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError("gates.suite", str(path), f"{fix} ({type(error).__name__})") from None
    targets = sum(text.inputs for text in drift.texts)
    if ids.shape != logprobs.shape or ids.ndim != 2 or len(ids) != targets:
        raise InputError("gates.suite", str(path), f"{fix} (it is of other texts)")
    return Likeliest(ids, logprobs)

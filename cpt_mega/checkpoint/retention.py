"""Which checkpoints of a run stay: rolling ones to go on from, permanent ones as its record, pinned ones whatever happens.

=========  ======================================================================================================
rolling    for going on after a stop: at looks of the gates, at intervals, when a run is stopped; the newest few stay
permanent  at ``checkpoint.interval_tokens`` and at the end; all stay unless ``checkpoint.keep_permanent`` says how many
pinned     the last before the decay, and what was asked for by ``SAVE``: never removed
start      what the run begins from, where gates may go back to it: goes when a later one was passed
=========  ======================================================================================================

Beside these the newest one, the newest healthy one and the best by the gates are never removed, of whatever kind. The base
that a run started from lies outside its folder and is never written to.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from cpt_mega.checkpoint.trainer_state import STATE_FILE
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders
from cpt_mega.lineage import COMPLETE, is_complete, read_json

ROLLING, PERMANENT, PINNED, START = "rolling", "permanent", "pinned", "start"


def removable(
    kinds: Mapping[int, str], keep_rolling: int, keep_permanent: int | None, kept: Collection[int]
) -> list[int]:
    """Steps of the checkpoints that need not stay, oldest first.

    Args:
        kinds: of each checkpoint, by step.
        keep_rolling, keep_permanent: how many of the newest of each kind stay; None: all.
        kept: steps that stay whatever their kind.
    """
    stay = {*kept, max(kinds, default=0)}
    for kind, count in ((ROLLING, keep_rolling), (PERMANENT, keep_permanent)):
        steps = sorted(step for step, found in kinds.items() if found == kind)
        stay |= set(steps if count is None else steps[-count:])
    return sorted(step for step, kind in kinds.items() if kind != PINNED and step not in stay)


def trim(run_dir: Path, newest: int, keep_rolling: int, keep_permanent: int | None, kept: Collection[int]) -> list[str]:
    """Removes what need not stay; returns the names. What cannot be removed is left for the next time.

    ``newest`` is the step just saved: what lies above it was passed over as damaged, so it neither counts nor goes. The other
    arguments are those of ``removable``.
    A folder that is not complete, or does not say what it is, is never touched: somebody may want to look at it.
    """
    folders = {int(path.name.removeprefix("iter_")): path for path in iteration_folders(run_dir / CHECKPOINTS)}
    kinds = {step: kind for step, path in folders.items() if step <= newest and (kind := _kind(path)) is not None}
    removed = []
    for step in removable(kinds, keep_rolling, keep_permanent, kept):
        try:
            (folders[step] / COMPLETE).unlink()  # first, so that a half removed one is no checkpoint
        except OSError:
            continue
        shutil.rmtree(folders[step], ignore_errors=True)
        removed.append(folders[step].name)
    return removed


def _kind(folder: Path) -> str | None:
    if not is_complete(folder):
        return None
    try:
        kind = read_json(folder / STATE_FILE).get("kind", PERMANENT)
    except (OSError, ValueError, AttributeError):
        return None
    return kind if kind in (ROLLING, PERMANENT, PINNED, START) else None

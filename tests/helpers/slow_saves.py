"""Checkpoints on a disk that takes its time: every process' first ``fsync`` of a part of a checkpoint takes so long."""

import os
from pathlib import Path

_SITE = """
import os, time

_fsync = os.fsync

def fsync(file):
    number = file if isinstance(file, int) else file.fileno()
    slept = {folder!r} + "/slept." + os.environ.get("RANK", "none")
    if os.readlink(f"/proc/self/fd/{{number}}").endswith(".distcp") and not os.path.exists(slept):
        time.sleep({seconds})
        open(slept, "w").close()
    return _fsync(file)

os.fsync = fsync
"""


def slow_saves(folder: Path, seconds: float) -> dict[str, str]:
    """The environment of a launch whose first save takes so long; ``folder`` holds ``slept.RANK`` afterwards."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(folder=str(folder), seconds=seconds))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

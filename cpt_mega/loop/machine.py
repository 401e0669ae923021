"""Whether a machine is fit to take part in a run, before a job of many hours starts on it."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

MOST_CLOCK_S = 120.0  # apart from the job script's: starting a task on every machine of a large job takes its time
LEAST_FREE = 2**30
LEAST_MEMORY_SHARE = 0.5
MOST_GPU_MIB = 2048  # a bare driver context on each of eight devices takes less
_TRAINER = b"cpt_mega.train"


def problems(folder: Path, clock: float) -> list[str]:
    """What makes this machine unfit, in words; empty when nothing does.

    Args:
        folder: of the run, which exists.
        clock: seconds since 1970 on the machine that asks, when it asked.
    """
    found = [
        _clock(clock),
        _room(folder, "the run folder"),
        _room(Path(tempfile.gettempdir()), "the folder for temporary files"),
        _left_over_processes(),
        _memory(),
        _gpus(),
    ]
    return [words for words in found if words]


def _clock(clock: float) -> str | None:
    apart = time.time() - clock
    return f"its clock is {apart:+.0f} s from the job's" if abs(apart) > MOST_CLOCK_S else None


def _room(folder: Path, name: str) -> str | None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-") as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{name} {folder} cannot be written ({error.strerror or error})"
    return f"{name} {folder} has {free / 2**20:,.0f} MiB free" if free < LEAST_FREE else None


def _left_over_processes() -> str | None:
    """Trainers that an earlier job left here. Several machines of a trial cluster may be one: Slurm names them."""
    here = os.environ.get("SLURMD_NODENAME", "").encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            name = _variable((process / "environ").read_bytes(), b"SLURMD_NODENAME")
        except OSError:  # it has ended, or is another user's
            continue
        if _TRAINER in words and b"-m" in words and name == here:
            left.append(process.name)
    return f"trainers of an earlier job still run: pid {', '.join(sorted(left, key=int))}" if left else None


def _variable(environment: bytes, name: bytes) -> bytes:
    entries = (entry.partition(b"=") for entry in environment.split(b"\0"))
    return next((value for key, _, value in entries if key == name), b"")


def _memory() -> str | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return None
    short = free < LEAST_MEMORY_SHARE * total
    return f"{free / 2**20:.0f} of {total / 2**20:.0f} GiB of its memory are available" if short else None


def _gpus() -> str | None:
    """Memory in use on devices where nothing of ours runs yet; a driver that does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        used = {index: int(mib) for index, mib in (line.split(",") for line in answer.splitlines() if line.strip())}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    busy = [f"{index.strip()} has {mib:,} MiB in use" for index, mib in used.items() if mib > MOST_GPU_MIB]
    return f"GPU {', '.join(busy)}" if busy else None

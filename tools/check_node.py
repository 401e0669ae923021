#!/usr/bin/env python
"""Whether this machine is fit to train: leftover trainers, memory, GPUs, disks, clock; or, with --together, whether all of a
job's machines reach each other. A line a machine; exit code 0 when it is fit."""

import argparse
import importlib.util
import json
import os
import socket
import sys
import time
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import run_tool  # noqa: E402
from cpt_mega.errors import ExitCode, InputError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=".", help="where the run will write (default: here)")
    parser.add_argument("--clock", type=float, help="date +%%s of the machine that asks (default: this one's)")
    parser.add_argument(
        "--together",
        metavar="HOST:PORT",
        help="exchange data with the other tasks of this Slurm step (or RANK and WORLD_SIZE), the first of them at HOST",
    )
    parser.add_argument("--timeout-s", type=float, default=120, help="how long --together waits (default: 120)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if arguments.together:
        found, told = [], reached(arguments)
    else:
        found, told = unfit(arguments), ""
    if arguments.json:
        print(json.dumps({"machine": name, "fit": not found, "problems": found}))
    else:
        # at once, line end and all: those of the other machines come to the same place
        sys.stdout.write(f"{name}: {'not fit: ' + '; '.join(found) if found else 'fit' + told}\n")
    return ExitCode.FAULT if found else 0


def unfit(arguments: argparse.Namespace) -> list[str]:
    """Raises InputError when there is no such folder."""
    from cpt_mega.loop.machine import problems

    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise InputError("--folder", arguments.folder, "is no folder; name the run's, or one above it")
    return problems(folder, time.time() if arguments.clock is None else arguments.clock)


def reached(arguments: argparse.Namespace) -> str:
    """Raises InputError outside of a step of several tasks, and FaultError when the others are not reached."""
    from cpt_mega.loop.noise import quieten

    quieten()
    from cpt_mega.engine.reach import exchange

    place = [
        os.environ.get(a, os.environ.get(b, "")) for a, b in (("SLURM_PROCID", "RANK"), ("SLURM_NTASKS", "WORLD_SIZE"))
    ]
    if not all(word.isdecimal() for word in place):
        raise InputError("--together", arguments.together, "is for a step of several tasks; start it with srun")
    rate = exchange(arguments.together, int(place[0]), int(place[1]), arguments.timeout_s)
    return f", with {place[1]} machines at {rate / 2**30:.2f} GiB/s"


if __name__ == "__main__":
    sys.exit(run_tool(main))

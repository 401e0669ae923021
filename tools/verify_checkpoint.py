#!/usr/bin/env python
"""Proves a checkpoint: files by their seal, tensors by the fingerprints of what the run had, the name of the weights.

Exit code 0: everything that can be checked is as it should be; 1: something is not, each file or tensor in a line; 2: bad
input.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, print_table, run_tool  # noqa: E402
from cpt_mega.errors import InputError  # noqa: E402

WRONG = 1
_NAME = re.compile(r"[0-9a-f]{12,64}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a run (newest), an iter_* folder, an import, an HF folder")
    parser.add_argument("--all", action="store_true", help="every checkpoint of a run, oldest first")
    parser.add_argument("--expect-weights", metavar="NAME", help="the name the weights must have, or 12 letters of it")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    check_name(arguments)
    from cpt_mega.checkpoint.verification import folders_to_verify, verify  # torch, which --help does not need

    found = []
    for folder in folders_to_verify(arguments.folder, arguments.all):
        with bytes_progress(f"verifying {folder.name}") as progress:
            one = verify(folder, progress)
        if arguments.expect_weights:
            one.expect(arguments.expect_weights)
        found.append(one)
        if not arguments.json:  # each as soon as it is known: there may be many, and large
            show_verdict(one)
    good = all(one.is_good for one in found)
    if arguments.json:
        print(json.dumps({"good": good, "folders": [one.to_json() for one in found]}))
    else:
        conclude(found, next_command(arguments.folder, arguments.all, found))
    return 0 if good else WRONG


def check_name(arguments: argparse.Namespace) -> None:
    """Raises InputError for a name that is none, or that would be asked of several checkpoints."""
    name = arguments.expect_weights
    if name is None:
        return
    if not _NAME.fullmatch(name):
        raise InputError("--expect-weights", name, "give the name, or its first 12 or more hexadecimal digits")
    if arguments.all:
        raise InputError("--expect-weights", name, "is of one checkpoint; leave --all out")


def show_verdict(found) -> None:
    """One line, and one for each problem."""
    many = f"{len(found.problems)} problem" + "s" * (len(found.problems) > 1)
    print(f"{found.path}: {('read' if found.type == 'hf' else 'verified') if found.is_good else many}")
    for problem in found.problems:
        print(f"  {problem}")


def conclude(found: list, following: str) -> None:
    """What was checked of a single folder, or how many of several are good."""
    if len(found) > 1:
        good = [one for one in found if one.is_good]
        newest = f", the newest {good[-1].path}" if good else ""
        print_table("", {"verified": f"{len(good)} of {len(found)}{newest}"}, following)
        return
    one = found[0]
    rows = {
        "weights": one.weights or "cannot be read",
        "checked": "\n".join(one.checked) or "nothing",
        "not checked": "\n".join(one.not_checked) or "nothing was left out",
    }
    print_table(one.path, rows, following)


def next_command(folder: str, every: bool, found: list) -> str:
    """What to do with it: go on, look for an older one, or take the damaged ones out of the way of one that is good."""
    last = found[-1]
    path = Path(last.path)
    if last.type == "hf":
        return f"python tools/import_hf.py --hf {shlex.quote(folder)} --output IMPORT"
    if last.is_good:
        return going_on(path, last.type)
    if not every and path.name.startswith("iter_"):
        return f"python tools/verify_checkpoint.py {shlex.quote(str(path.parent))} --all"
    good = [number for number, one in enumerate(found) if one.is_good]
    if not good:
        return "python tools/import_hf.py --hf HF_FOLDER --output IMPORT"
    newer = [shlex.quote(one.path) for one in found[good[-1] + 1 :]]
    moves = " && ".join(f"mv {bad} {bad}.damaged" for bad in newer)
    return f"{moves}  # the run then goes on from {Path(found[good[-1]].path).name}, which verifies"


def going_on(folder: Path, kind: str) -> str:
    if kind == "import":
        return f"python -m cpt_mega.train --config FILE model.checkpoint={shlex.quote(str(folder))} --dry-run"
    config = folder.parent.parent / "config.yaml"
    if folder.parent.name == "checkpoints" and config.is_file():
        return f"bash launch/torchrun.sh {shlex.quote(str(config))}"
    return f"python tools/export_hf.py --checkpoint {shlex.quote(str(folder))} --output EXPORT"


if __name__ == "__main__":
    sys.exit(run_tool(main, "interrupted: verified no further"))

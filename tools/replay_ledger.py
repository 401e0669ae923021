#!/usr/bin/env python
"""Takes every decision of a run's gates again, from the item scores and rules that it wrote down.

    python tools/replay_ledger.py RUN

Exit code 0: all come out as the ledger says, number for number; 1: some do not; 2: no run with verdicts.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import run_tool  # noqa: E402

DIFFER = 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run.dir")
    parser.add_argument("--json", action="store_true", help="print the decisions as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from cpt_mega.loop.verdict_replay import take_again  # torch, which --help does not need

    found = take_again(arguments.run)
    if arguments.json:
        print(
            json.dumps(
                [{"step": one.line["step"], "action": one.action, "difference": one.difference} for one in found]
            )
        )
    else:
        show(found)
    return DIFFER if any(one.difference for one in found) else 0


def show(found) -> None:
    """One line a look, and what a user should know of them all."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="decisions taken again", title_justify="left")
    for name, justify in (
        ("step", "right"),
        ("tokens", "right"),
        ("ledger", "left"),
        ("now", "left"),
        ("rules", "left"),
    ):
        table.add_column(name, justify=justify)
    for one in found:
        rules = [f"{verdict['rule']} {verdict['level']}" for verdict in one.line["verdicts"]]
        place = (f"{one.line['step']:,}", f"{one.line['tokens']:,}")
        table.add_row(*place, one.line["action"], one.action, ", ".join(rules) or "none")
    Console().print(table)
    for one in found:
        if one.difference:
            print(f"step {one.line['step']}: {one.difference}")
    wrong = sum(one.difference is not None for one in found)
    print(f"{len(found) - wrong} of {len(found)} decisions come out as the ledger says, number for number")


if __name__ == "__main__":
    sys.exit(run_tool(main))

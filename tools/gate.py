#!/usr/bin/env python
"""Measures a model with a suite of gates, as a run does at every look: one table, and a line for each item.

    python tools/gate.py --model DIR --suite configs/gates/general.yaml
    torchrun --nproc-per-node 2 tools/gate.py --model DIR --suite FILE parallel.tp=2

DIR is a run, an iter_* folder, an import or an HF folder. Results may be compared where their digests are the same.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import steps_progress  # noqa: E402
from cpt_mega.loop.entry import guarded, leave  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a run, an iter_* folder, an import, an HF folder"
    )
    parser.add_argument(
        "--suite", required=True, metavar="FILE", help="YAML of probes; ready ones are in configs/gates"
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the model that drift is measured from; without it that is left out"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write every item's score, a JSON line each")
    parser.add_argument(
        "--power", action="store_true", help="measure nothing: say what drops the suite's gates can show at all"
    )
    parser.add_argument(
        "--looks",
        type=int,
        default=20,
        metavar="K",
        help="of the run, for --power: alpha is split over them (default 20)",
    )
    parser.add_argument("--json", action="store_true", help="print readings and digests as JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="layout and precision, as in a configuration"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    options = parse_arguments()
    return guarded(lambda: show_power(options) if options.power else measure(options), None)


def measure(options: argparse.Namespace) -> int:
    from cpt_mega.loop.gate_alone import check_output, measure_alone, write_items  # torch, which --help does not need

    if options.output is not None:
        check_output(options.output)
    is_main = os.environ.get("RANK", "0") == "0"
    silent = contextlib.nullcontext(lambda done, total: None)
    with steps_progress("asking") if is_main else silent as progress:
        measured = measure_alone(options.model, options.suite, options.base, options.overrides, progress)
    if measured is None:
        return 0
    if options.output is not None:
        write_items(options.output, measured)
    if options.json:
        print(json.dumps(measured.to_json()))
    else:
        show(measured, options)
    return 0


def show_power(options: argparse.Namespace) -> int:
    """A table of what each gate of items is for, and what its items carry."""
    from cpt_mega.errors import InputError
    from cpt_mega.loop.gate_alone import suite_powers  # torch, which --help does not need

    if options.looks < 1:
        raise InputError("--looks", options.looks, "a run has one look at least")
    found = suite_powers(options.model, options.suite, options.looks)
    if options.json:
        print(json.dumps({"looks": options.looks, "gates": [power.to_json() for power in found]}))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"what the gates of items show in {options.looks} looks", title_justify="left")
    for name in ("gate", "probes"):
        table.add_column(name)
    for name in ("items", "threshold", "carried"):
        table.add_column(name, justify="right")
    for power in found:
        table.add_row(power.gate.name, ", ".join(power.gate.probes), f"{power.items:,}", *thresholds(power))
    Console().print(table)
    for gate in (power.gate for power in found):
        if gate.disarmed:
            print(f"{gate.name} is not armed: {gate.disarmed}")
    print(
        "A drop of twice the threshold is found within two looks in 95 % of cases, at 10 % of items that change anyway;"
    )
    print(
        "one of half of it alarms in 5 % of runs at most. A threshold below what is carried is refused at a run's start."
    )
    return 0


def thresholds(power) -> tuple[str, str]:
    """What a gate is for, and the smallest that its items carry."""
    gate, carried = power.gate, "not known before"
    if gate.binary:
        carried = "none" if power.smallest > 1 else gate.in_words(power.smallest)
    below = ", below what is carried" if gate.binary and gate.threshold < power.smallest else ""
    return "not armed" if gate.disarmed else gate.in_words(gate.threshold) + below, carried


def error_of(reading) -> str:
    """The standard error of a share of right answers."""
    if not reading.metric.startswith("acc") or not 0 <= reading.value <= 1:
        return ""
    return f"{math.sqrt(reading.value * (1 - reading.value) / reading.n):.2g}"


def show(measured, options: argparse.Namespace) -> None:
    """A table of readings, the first of each probe in its first line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{measured.suite.name} ({measured.suite.digest[:12]})", title_justify="left")
    for name, justify in (
        ("probe", "left"),
        ("bucket", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("\u00b1", "right"),
        ("n", "right"),
    ):
        table.add_column(name, justify=justify)
    for one in measured.found:
        for number, reading in enumerate(one.readings):
            names = ("", "") if number else (one.probe.name, one.probe.bucket)
            table.add_row(*names, reading.metric, f"{reading.value:.4g}", error_of(reading), f"{reading.n:,}")
    Console().print(table)
    if measured.left_out:
        print(f"not measured: {', '.join(measured.left_out)} (drift needs --base DIR)")
    suite = shlex.quote(str(Path(options.suite).absolute()))
    print(f"next: bash launch/torchrun.sh CONFIG gates.suite={suite}    # the same at every look of a run")


if __name__ == "__main__":
    sys.exit(leave(main()))

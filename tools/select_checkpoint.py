#!/usr/bin/env python
"""Which checkpoint of a run to take, and why: what the gates found since step 0, the Pareto frontier, and J on it.

J = w_domain * gain - w_general * regression - w_behaviour * regression - w_safety * regression; a change of +1.00 is one point
of right answers, or one per cent of a loss. Weights are those of the run's suite, or --weights. Intervals are 95 %.
"""

import argparse
import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run.dir")
    parser.add_argument(
        "--weights", metavar="LIST", help="domain=1,general=2: in place of the run's, those that are named"
    )
    parser.add_argument("--export", metavar="DIR", help="export the choice as a Hugging Face folder; must not exist")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from cpt_mega.loop.selecting import parse_weights, select_checkpoint  # scipy, which --help does not need

    weights = None if arguments.weights is None else parse_weights(arguments.weights)
    found = select_checkpoint(arguments.run, weights)
    report = None if arguments.export is None else export(found.checkpoint, arguments.export)
    if arguments.json:
        print(json.dumps(found.to_json() | {"export": report and report.to_json()}))
    else:
        show(found)
        tell_next(found, report)


def export(checkpoint: Path, target: str):
    """The report of ``export_hf``."""
    from cpt_mega.hf.convert import export_hf  # torch

    with bytes_progress("exporting") as progress:
        return export_hf(checkpoint, target, progress=progress)


def show(found) -> None:
    """A line for each checkpoint at which the gates looked."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # intervals and paths may hold what rich takes for markup

    choice = found.choice
    weights = ", ".join(f"{bucket} {choice.weights[bucket]:g}" for bucket in choice.buckets)
    table = Table(title=Text(f"{found.run_dir}: change since step 0 in %; weights: {weights}"), title_justify="left")
    for name in ("step", "tokens", *choice.buckets, "J"):
        table.add_column(name, justify="right")
    table.add_column("frontier")
    for one in choice.candidates:
        changes = [change_text(one.changes.get(bucket)) for bucket in choice.buckets]
        row = [f"{one.step:,}", f"{one.tokens:,}", *changes, score_text(one.j), place_text(one, choice.step)]
        table.add_row(*map(Text, row), style="bold" if one.step == choice.step else None)
    Console().print(table)
    print(
        "1 is a point of right answers, or 1 % of a loss in nats; in brackets what other such items or texts could give"
    )
    print(" ".join(found.reasons))
    if left_out := [bucket for bucket in choice.weights if bucket not in choice.buckets]:
        print(f"not measured: {', '.join(left_out)}")


def change_text(change) -> str:
    return "" if change is None else interval_text(change, 100, "+.2f")


def score_text(j) -> str:
    return "" if j is None else interval_text(j, 1, ".4f")


def interval_text(estimate, factor: int, form: str) -> str:
    value, low, high = (format(factor * number, form) for number in (estimate.value, estimate.low, estimate.high))
    if not math.isfinite(estimate.high - estimate.low):
        return f"{value} [one item: not known]"
    return f"{value} [{low}, {high}]"


def place_text(one, chosen: int) -> str:
    if one.objection:
        return f"no: {one.objection}"
    if one.dominated_by is not None:
        return f"dominated by {one.dominated_by}"
    return "yes, chosen" if one.step == chosen else "yes"


def tell_next(found, report) -> None:
    if report is not None:
        print(f"exported {report.source} to {report.output}")
        load = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({report.output!r}))"
        print(f'next: python -c "{load}"')
        return
    words = shlex.quote(str(found.checkpoint)), shlex.quote(str(found.run_dir / f"export-{found.choice.step}"))
    print(f"next: python tools/export_hf.py --checkpoint {words[0]} --output {words[1]}")


if __name__ == "__main__":
    sys.exit(run_tool(main))

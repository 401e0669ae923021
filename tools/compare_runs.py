#!/usr/bin/env python
"""Names the first difference of two runs in data, metrics and weights.

Exit code 0: they are equal in everything that was compared, or differ by the tolerance at most; 1: they differ; 2: bad
input, or nothing in common. Times, rates, names and places are never compared; other configurations are only told.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, print_table, run_tool, steps_progress  # noqa: E402
from cpt_mega.errors import InputError  # noqa: E402

DIFFER = 1
MOST_LINES = 6  # of a cell


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="a run.dir")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="R",
        help="count relative differences up to R and go past them (default 0: every bit of every value); of tensors, relative "
        "to the largest magnitude in the tensor; counts of tokens and rows are always exact",
    )
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not 0 <= arguments.tolerance < float("inf"):
        raise InputError("--tolerance", arguments.tolerance, "give a relative difference, as 1e-4")
    from cpt_mega.loop.comparison import compare_runs  # torch, which --help does not need

    drawing, reading = steps_progress("drawing the data again"), bytes_progress("reading checkpoints")
    found = compare_runs(arguments.a, arguments.b, arguments.tolerance, drawing, reading)
    if arguments.json:
        print(json.dumps(found.to_json()))
    else:
        show(found)
    return DIFFER if found.first else 0


def show(found) -> None:
    """The verdict, what was found of each part, and what to look at next."""
    print(verdict(found))
    rows = {"data": data_lines(found.data), "metrics": series_lines(found.metrics, "steps", "loss")}
    rows |= {
        "weights": weights_lines(found.weights),
        "readings": series_lines(found.readings, "evaluations", "reading"),
    }
    rows["configuration"] = [f"{one.field}: {one.a} in A, {one.b} in B" for one in found.config] or ["the same"]
    rows["not compared"] = found.not_compared or ["nothing was left out"]
    print_table(f"A {found.a}\nB {found.b}", {name: cell(lines) for name, lines in rows.items()}, next_command(found))


def cell(lines: list[str]) -> str:
    shown = (
        lines
        if len(lines) <= MOST_LINES
        else [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more (--json)"]
    )
    return "\n".join(shown)


def verdict(found) -> str:
    first = found.first
    if first is not None:
        place = f"in the checkpoint of step {first.step}" if first.area == "weights" else f"at step {first.step}"
        return f"first difference: {first.what} ({first.area}) {place}: {first.text}"
    if found.is_exact:
        return "equal in everything that was compared"
    return f"equal within a tolerance of {found.tolerance:g} in everything that was compared"


def data_lines(data) -> list[str]:
    if not data.steps:
        return ["not compared"]
    means = "rows drawn again" if data.by == "rows" else "by the ledgers"
    if data.first_step is None:
        return [f"{data.steps:,} steps: the same rows, {means}"]
    lines = [f"parts at step {data.first_step}, {means}"]
    lines += [f"{one.field}: {one.a} in A, {one.b} in B" for one in data.entries]
    return lines + [f"place {one.place}: {row_text(one.a)} in A, {row_text(one.b)} in B" for one in data.rows]


def row_text(row: dict | None) -> str:
    if row is None:
        return "nothing"
    documents = [str(piece["document"]) for piece in row["documents"]]
    more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
    return f"row {row['row']} of {row['source']} (documents {', '.join(documents[:3])}{more})"


def series_lines(series, what: str, headline: str) -> list[str]:
    if not series.common:
        return ["not compared"]
    counts = {"equal": series.equal, "within the tolerance": series.within}
    counts["beyond it" if series.within else "that differ"] = series.common - sum(counts.values())
    lines = [f"{what}: {series.common:,} in both, " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)]
    if series.largest is not None:
        largest = value_text(series.largest)
        lines.append(f"largest relative difference of a {headline}, at step {series.largest_step}: {largest}")
    if series.first_step is not None:
        lines.append(f"first at step {series.first_step}:")
        lines += [f"  {value_text(one)}" for one in series.first]
    for who, count in zip("AB", series.repeated, strict=True):
        if count:
            lines.append(f"{count:,} lines of {who} were written again; the last counts")
    return lines


def value_text(value) -> str:
    amount = "" if value.relative is None else f" (absolute {value.absolute:.3g}, relative {value.relative:.3g})"
    return f"{value.field} {value.a} in A, {value.b} in B{amount}"


def weights_lines(weights) -> list[str]:
    """Checkpoints that are equal in a line, those within the tolerance in another, and the one that differs in full."""
    kept = [one for one in weights.checkpoints if not one.differs]
    equal, within = [one for one in kept if not one.differing], [one for one in kept if one.differing]
    lines = [f"{steps_text(equal)}: {equal[0].tensors:,} tensors equal"] if equal else []
    if within:
        worst = max(within, key=lambda one: one.largest_relative)
        lines.append(f"{steps_text(within)}: within the tolerance; {amount_text(worst)}")
    if weights.first is not None:
        lines += difference_lines(weights.first)
    return lines or ["not compared"]


def steps_text(checkpoints: list) -> str:
    words = [str(one.step) for one in checkpoints]
    return ("step " if len(words) == 1 else "steps ") + ", ".join(words)


def amount_text(checkpoint) -> str:
    largest = checkpoint.largest
    return (
        f"at step {checkpoint.step} {checkpoint.differing:,} of {checkpoint.tensors:,} tensors differ, "
        f"{checkpoint.differing_elements:,} of {checkpoint.elements:,} elements, relative at most "
        f"{checkpoint.largest_relative:.3g}; largest absolute {largest.absolute:.3g} in {largest.key} at {largest.at}"
    )


def difference_lines(checkpoint) -> list[str]:
    lines = [amount_text(checkpoint)] if checkpoint.differing else []
    if checkpoint.first is not None:
        lines.append(f"first beyond the tolerance, in model order: {checkpoint.first.key}")
    for who, keys in zip("AB", checkpoint.weights_only_in, strict=True):
        lines += [f"only in {who}: {key}" for key in keys]
    lines += [f"trainer_state {value_text(one)}" for one in checkpoint.state]
    return lines + [f"{key} is {a} in A, {b} in B" for key, a, b in checkpoint.dtypes]


def next_command(found) -> str:
    """A look at the documents of the step where they part, where the data can be drawn again."""
    a, b = shlex.quote(found.a), shlex.quote(found.b)
    if found.first is None:
        return f"python tools/compare_runs.py {a} {b} --json"
    if not found.first.step or found.data.not_compared:
        return f"diff {a}/config.yaml {b}/config.yaml"
    return f"python tools/inspect_data.py --run {a} --step {found.first.step}"


if __name__ == "__main__":
    sys.exit(run_tool(main))

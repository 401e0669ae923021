#!/usr/bin/env python
"""What a checkpoint carries; with --other how it differs from another one; with --tree which run came from which checkpoint.

Reads JSON and the index of tensors, never a tensor. Exit code 0 also where two checkpoints differ: tools/compare_runs.py
judges, and tools/verify_checkpoint.py proves.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import print_table, run_tool  # noqa: E402
from cpt_mega.errors import InputError  # noqa: E402

MISSING = "not recorded"
MOST_LINES = 12  # of a cell
MOST_WORDS = 100  # letters of a value
NAME_LETTERS = 12  # of a digest


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a run (newest), an iter_* folder, an import; a folder of runs")
    parser.add_argument(
        "--other", metavar="DIR2", help="tell the difference of two checkpoints, values by fingerprints"
    )
    parser.add_argument("--tree", action="store_true", help="DIR is a folder of runs: draw who came from whom")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, names in full")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.tree and arguments.other:
        raise InputError("--other", arguments.other, "does not go with --tree; leave one of them out")
    if arguments.tree:
        tell_family(arguments)
        return
    from cpt_mega.checkpoint.inspection import differences, inspect  # torch, which --help and --tree do not need

    found = inspect(arguments.folder)
    if arguments.other:
        difference = differences(found, inspect(arguments.other))
        show(arguments.json, difference, show_difference)
    else:
        show(arguments.json, found, show_checkpoint)


def show(as_json: bool, found, draw) -> None:
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        draw(found)


def show_checkpoint(found) -> None:
    """The table of one checkpoint."""
    record = found.record
    rows = {"is": "an import: weights alone, of no run"} if record.is_import else run_rows(found)
    model = record.model
    rows |= {
        "weights": name_text(record.weights),
        "base": name_text(record.base_digest) + (f", from {model['source']}" if model.get("source") else ""),
        "tokenizer": name_text(record.tokenizer_digest),
        "tensors": tensors_text(found),
        "size": f"{found.bytes:,} bytes in {found.files:,} files",
        "sealed": "yes" if record.is_sealed else "no: it is no checkpoint for the trainer",
    }
    if record.is_import:
        rows["weights"] = "an import does not record their name; verify_checkpoint.py computes it"
    words = shlex.quote(str(record.folder))
    print_table(str(record.folder), rows, f"python tools/verify_checkpoint.py {words}")


def run_rows(found) -> dict[str, str]:
    """What a run's checkpoint has and an import has not."""
    record, lineage = found.record, found.record.lineage
    sources = record.tokens_by_source
    by_source = None if sources is None else ", ".join(f"{name} {number(n)}" for name, n in sources.items())
    return {
        "is": f"a checkpoint of run {said(record.run_id)}, step {number(record.step)}",
        "tokens": number(record.tokens) + (f": {by_source}" if by_source else ""),
        "kind": said(record.kind),
        "health": health_text(record),
        "parent": parent_text(found.parent),
        "began with weights": name_text(record.parent_weights),
        "corpora": names_text(lineage.get("corpora")),
        "evaluation": names_text(lineage.get("eval")),
        "packing": f"version {said(lineage.get('packing_version'))}",
        "code": code_text(lineage.get("code")),
        "libraries": pairs_text(lineage.get("libraries")),
        "restore mode": f"began by {said(lineage.get('began'))}, last started by {said(lineage.get('restore'))}",
        "saved at": f"{pairs_text(record.state.get('layout'))}; {said(record.config.get('precision'))}",
    }


def said(value: object) -> str:
    return MISSING if value is None else str(value)


def number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else said(value)


def name_text(digest: object) -> str:
    return MISSING if digest is None else str(digest)[:NAME_LETTERS] or "none"


def names_text(digests: object) -> str:
    if not isinstance(digests, dict):
        return said(digests)
    return ", ".join(f"{name} {name_text(digest)}" for name, digest in digests.items()) or "none"


def pairs_text(values: object) -> str:
    if not isinstance(values, dict) or not values:
        return MISSING
    return ", ".join(f"{name} {value}" for name, value in values.items())


def code_text(code: object) -> str:
    if not isinstance(code, dict):
        return said(code)
    commit = f"commit {code['commit']}" if code.get("commit") else "not from a git checkout"
    return f"{said(code.get('version'))}, {commit}" + (", with changes" if code.get("dirty") else "")


def health_text(record) -> str:
    """What the gates said at this step, and on which readings."""
    readings = [f"{bucket} perplexity {reading_text(r, ' since step 0')}" for bucket, r in record.readings.items()]
    return "; ".join([said(record.health), *readings])


def reading_text(reading, since: str = "") -> str:
    value = f"{reading.perplexity:,.4g}" if isinstance(reading.perplexity, int | float) else said(reading.perplexity)
    return value if reading.rise is None else f"{value} ({reading.rise:+.1%}{since})"


def parent_text(parent) -> str:
    if parent is None:
        return MISSING
    if not parent.found:
        return f"{parent.path}, which is not there now"
    of = "an import" if parent.run_id is None else f"run {parent.run_id}, step {number(parent.step)}"
    return f"{parent.path} ({of})"


def tensors_text(found) -> str:
    if found.index_problem:
        return found.index_problem
    lines = []
    for name, tensors in (("weights", found.weights), ("optimizer", found.optimizer)):
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in tensors.dtypes.items())
        lines.append(f"{name}: {tensors.count:,} ({dtypes}), {tensors.elements:,} elements" if tensors.count else "")
    return "\n".join(filter(None, lines))


def show_difference(found) -> None:
    """The table of two."""
    fields = {"lineage": found.lineage, "configuration": found.config, "state": found.state, "model": found.model}
    rows = {name: cell([field_text(one) for one in some], "the same") for name, some in fields.items()}
    tensors = [f"{one.field}: {tensor_text(one.a)} in A, {tensor_text(one.b)} in B" for one in found.tensors]
    tensors += [f"only in {who}: {key}" for who, keys in zip("AB", found.only_in, strict=True) for key in keys]
    rows["tensors"] = cell(tensors, "the same names, shapes and dtypes")
    rows["values"] = cell(values_lines(found), "not compared")
    rows["not compared"] = cell(found.not_compared, "nothing was left out")
    a, b = shlex.quote(found.a), shlex.quote(found.b)
    print_table(f"A {found.a}\nB {found.b}", rows, f"python tools/inspect_checkpoint.py {a} --other {b} --json")


def field_text(one) -> str:
    return f"{one.field}: {short(one.a)} in A, {short(one.b)} in B"


def short(value: object) -> str:
    words = "nothing" if value is None else str(value)
    return words if len(words) <= MOST_WORDS else f"{words[: MOST_WORDS - 3]}..."


def tensor_text(entry: list) -> str:
    dtype, shape = entry
    return f"{dtype} {shape}"


def values_lines(found) -> list[str]:
    compared = len(found.values) + found.equal_values
    if not compared:
        return []
    lines = [f"{len(found.values):,} of {compared:,} tensors have other values, by their fingerprints"]
    return lines + found.values


def cell(lines: list[str], none: str) -> str:
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more (--json)"]
    return "\n".join(lines) or none


def tell_family(arguments: argparse.Namespace) -> None:
    """The family tree of a folder of runs."""
    from cpt_mega.checkpoint.family import read_family

    family = read_family(arguments.folder)
    show(arguments.json, family, lambda found: draw_family(found, Path(arguments.folder)))


def draw_family(family, root: Path) -> None:
    """Imports first, then runs whose parent is not found; paths below ``root`` from there."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def place(folder: Path) -> str:
        base = root.resolve()
        return str(folder.relative_to(base) if folder != base and folder.is_relative_to(base) else folder)

    def add(branch: Tree, words: str) -> Tree:
        return branch.add(Text(words, overflow="fold"))  # a Text, as paths may hold what rich takes for markup

    def grow(branch: Tree, run) -> None:
        link = family.links[run.folder]
        how = f", found by {link.by}" if link.by and link.by != "path" else ""
        stem = add(branch, f"run {said(run.newest.run_id)} in {place(run.folder)}{how}")
        if link.parent is None:
            newest = run.newest
            words = f"its parent is not found: {said(newest.parent)}, weights {name_text(newest.parent_weights)}"
            add(stem, words)
        if link.note:
            add(stem, f"({link.note})")
        for record in run.checkpoints:
            twig = add(stem, checkpoint_line(record))
            for child in family.children(record.folder):
                grow(twig, child)

    tree = Tree(Text(str(root), overflow="fold"))
    for folder, record in family.imports.items():
        source = record.model.get("source")
        words = f"import {place(folder)}: base {name_text(record.base_digest)}, from {said(source)}"
        branch = add(tree, words)
        for run in family.children(folder):
            grow(branch, run)
    for run in family.orphans:
        grow(tree, run)
    Console().print(tree)
    for words in family.passed_over:
        print(f"passed over: {words}")
    newest = [run.newest.folder for run in family.runs.values()] or list(family.imports)
    print(f"next: python tools/inspect_checkpoint.py {shlex.quote(str(newest[-1]))}")


def checkpoint_line(record) -> str:
    readings = [f"{bucket} {reading_text(reading)}" for bucket, reading in record.readings.items()]
    words = [f"{number(record.tokens)} tokens", said(record.kind), said(record.health), *readings]
    return f"step {number(record.step)}: " + ", ".join(words)


if __name__ == "__main__":
    sys.exit(run_tool(main))

#!/usr/bin/env python
"""What is in a corpus: counts and documents as text; --verify checks it, --write-manifest describes Megatron-LM's files.

With --run: which documents a run saw at a step, and at which steps it saw a document.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, print_table, run_tool, steps_progress  # noqa: E402
from cpt_mega.data import inspection  # noqa: E402
from cpt_mega.data.indexed import IndexedCorpus  # noqa: E402
from cpt_mega.data.manifest import load_manifest, manifest_path  # noqa: E402
from cpt_mega.data.packing import BEST_FIT, METHODS, RowPlan  # noqa: E402
from cpt_mega.data.plan_picture import draw_plan  # noqa: E402
from cpt_mega.data.plan_store import open_plan  # noqa: E402
from cpt_mega.data.tokenizer import TextTokenizer  # noqa: E402
from cpt_mega.errors import InputError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", nargs="?", help="path of the corpus without .bin and .idx")
    parser.add_argument(
        "--document",
        metavar="I",
        help="show document I (from 0): text, or ids alone; with --run, SOURCE:I: at which steps it was seen",
    )
    parser.add_argument("--rows", type=int, metavar="TOKENS", help="how its documents fill rows of so many tokens")
    parser.add_argument("--packing", choices=list(METHODS), help=f"with --rows (default {BEST_FIT})")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --rows: a picture of it, .png or .svg")
    parser.add_argument("--run", metavar="RUN", help="a run.dir instead of PREFIX")
    parser.add_argument("--step", type=int, metavar="K", help="with --run: the rows of step K (from 1)")
    parser.add_argument("--tokenizer", metavar="DIR_OR_MODEL", help="turns ids into text; must be the corpus' own")
    parser.add_argument(
        "--verify", action="store_true", help="check digests, ids, EOS and sources; exit code 2 if wrong"
    )
    parser.add_argument("--write-manifest", action="store_true", help="for files without one; needs --tokenizer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_together(arguments)
    arguments.packing = arguments.packing or BEST_FIT
    if (arguments.prefix is None) == (arguments.run is None):
        raise InputError("PREFIX", arguments.prefix, "name a corpus, or a run with --run")
    if arguments.run is not None:
        inspect_run(arguments)
        return
    prefix = arguments.prefix.removesuffix(".bin").removesuffix(".idx")
    corpus = IndexedCorpus(prefix)
    if arguments.write_manifest:
        write_manifest(corpus, arguments.tokenizer)
    if arguments.document is not None:
        show_document(corpus, document_number(arguments.document), arguments)
    elif arguments.verify:
        verify(corpus, arguments.json)
    elif arguments.rows is not None:
        show_rows(corpus, arguments)
    else:
        show_summary(inspection.summarise(corpus), arguments.json)


def check_together(arguments: argparse.Namespace) -> None:
    """Raises InputError for an option that would be passed over without another."""
    of_corpora = (("rows", "prefix"), ("verify", "prefix"), ("write_manifest", "prefix"))
    for name, needs in (("picture", "rows"), ("packing", "rows"), ("step", "run"), *of_corpora):
        value = getattr(arguments, name)
        if value is not None and value is not False and getattr(arguments, needs) is None:
            fix = "goes with PREFIX" if needs == "prefix" else f"goes with --{needs}"
            raise InputError(f"--{name.replace('_', '-')}", str(value), fix)


def document_number(word: str) -> int:
    """Raises InputError for what is no number."""
    if not word.isdecimal():
        raise InputError("--document", word, "give a number from 0; SOURCE:I goes with --run")
    return int(word)


def inspect_run(arguments: argparse.Namespace) -> None:
    """The rows of a step, or the steps of a document."""
    from cpt_mega.loop.replay import Replay

    if (arguments.step is None) == (arguments.document is None):
        raise InputError("--run", arguments.run, "add --step K, or --document SOURCE:I")
    replay = Replay(arguments.run)
    if arguments.step is not None:
        show_step(replay, arguments)
        return
    source, _, number = arguments.document.rpartition(":")
    if not source:
        raise InputError("--document", arguments.document, "give SOURCE:I, as domain:17")
    with steps_progress("drawing the run again") as progress:
        found = list(replay.when_seen(source, document_number(number), progress))
    if arguments.json:
        seen = [{"step": step, "place": place, **asdict(piece)} for step, place, piece in found]
        print(json.dumps({"document": arguments.document, "steps_done": replay.last_step, "seen": seen}))
        return
    times = "once" if len(found) == 1 else f"{len(found)} times"
    print(f"document {number} of {source}: seen {times} in {replay.last_step:,} steps")
    for step, place, piece in found:
        print(f"  step {step}, row {place}: tokens {piece.start:,} to {piece.start + piece.length:,}")


def show_step(replay, arguments: argparse.Namespace) -> None:
    """Each row of a step: its source and documents, and their text when there is a tokenizer."""
    tokenizer = TextTokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    rows = replay.rows_of(arguments.step)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "rows": [as_json(row, tokenizer) for row in rows]}))
        return
    done = "" if arguments.step <= replay.last_step else ", which the run has not finished"
    print(f"step {arguments.step} of {replay.last_step:,}{done}: {len(rows)} rows")
    for place, row in enumerate(rows):
        targets = int(row.packed.loss_mask.sum())
        print(f"row {place}: row {row.row} of {row.source}, {len(row.pieces)} documents, {targets:,} targets")
        for piece, ids, mask in pieces_of(row):
            text = " ".join(map(str, ids[:12])) if tokenizer is None else repr(tokenizer.decode(ids)[:60])
            span = f"tokens {piece.start:,} to {piece.start + piece.length:,}, {sum(mask):,} targets"
            print(f"  document {piece.document}, {span}: {text}")


def as_json(row, tokenizer: TextTokenizer | None) -> dict:
    """A row with the tokens of each document, and for each whether its target, the next token, counts."""
    documents = [
        {**asdict(piece), "ids": ids, "mask": mask, "text": tokenizer and tokenizer.decode(ids)}
        for piece, ids, mask in pieces_of(row)
    ]
    padding = len(row.packed.ids) - sum(piece.length for piece in row.pieces)
    return {"source": row.source, "row": row.row, "documents": documents, "padding": padding}


def pieces_of(row) -> Iterator[tuple]:
    """Each piece of a row, its token ids and its mask."""
    at = 0
    for piece in row.pieces:
        span = slice(at, at + piece.length)
        yield piece, row.packed.ids[span].tolist(), row.packed.loss_mask[span].astype(int).tolist()
        at += piece.length


def write_manifest(corpus: IndexedCorpus, tokenizer: str | None) -> None:
    """Writes the manifest of files that have none; raises InputError where there is one, or without a tokenizer."""
    if load_manifest(corpus.prefix) is not None:
        raise InputError("--write-manifest", str(manifest_path(corpus.prefix)), "is there already; --verify checks it")
    if tokenizer is None:
        raise InputError("--tokenizer", None, "name the tokenizer that made the corpus: a manifest is about its ids")
    with bytes_progress("reading") as progress:
        manifest = inspection.make_manifest(corpus, inspection.load_own_tokenizer(corpus, tokenizer), progress)
    manifest.write(corpus.prefix)
    print(f"written: {manifest_path(corpus.prefix)}", file=sys.stderr)


def show_document(corpus: IndexedCorpus, document: int, arguments: argparse.Namespace) -> None:
    """One document, as text when there is a tokenizer."""
    ids = inspection.document_ids(corpus, document)
    tokenizer = inspection.load_own_tokenizer(corpus, arguments.tokenizer) if arguments.tokenizer else None
    text = tokenizer.decode(ids) if tokenizer else None
    if arguments.json:
        print(json.dumps({"document": document, "ids": ids, "text": text}))
        return
    print(f"document {document} of {corpus.documents:,}, {len(ids):,} tokens")
    print(" ".join(map(str, ids)) if text is None else text)


def show_rows(corpus: IndexedCorpus, arguments: argparse.Namespace) -> None:
    """How documents fill rows: numbers, and a picture."""
    if arguments.rows < 1:
        raise InputError("--rows", arguments.rows, "give the tokens of a row, as 4096")
    plan = open_plan(corpus, arguments.rows, arguments.packing)
    found = plan.statistics
    if arguments.json:
        print(json.dumps({"seq_length": plan.seq_length, **asdict(found), "fill": found.fill}))
    else:
        print_rows(corpus, plan, arguments)
    if arguments.picture is not None:  # last: what draws it may be missing
        draw_plan(plan, corpus.document_lengths, arguments.picture, Path(corpus.prefix).name)


def print_rows(corpus: IndexedCorpus, plan: RowPlan, arguments: argparse.Namespace) -> None:
    """The numbers of a plan as a table."""
    found = plan.statistics
    most = f"99 % at most {found.documents_a_row_p99:,}, {found.most_documents:,} in one"
    rows = {
        "rows": f"{found.rows:,} of {plan.seq_length:,} tokens, {arguments.packing}",
        "fill": f"{found.fill:.3%}; {found.padding:,} tokens of padding",
        "split documents": f"{found.split_documents:,} of {found.documents:,}",
        "documents a row": f"{found.documents_a_row:.1f}; {most}",
    }
    drawn = f"open {shlex.quote(str(arguments.picture))}" if arguments.picture else None
    words = f"python tools/inspect_data.py {shlex.quote(corpus.prefix)} --rows {plan.seq_length} --picture rows.png"
    print_table(corpus.prefix, rows, drawn or words)


def verify(corpus: IndexedCorpus, as_json: bool) -> None:
    """Says what is wrong; raises InputError, for its exit code, when anything is."""
    with bytes_progress("verifying") as progress:
        problems = inspection.find_problems(corpus, progress)
    if as_json:
        print(json.dumps({"prefix": corpus.prefix, "problems": problems}))
    elif not problems:
        print(f"{corpus.prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens: all as the manifest says")
    if problems:
        raise InputError("--verify", corpus.prefix, "; ".join(problems))


def show_summary(summary: inspection.CorpusSummary, as_json: bool) -> None:
    """Counts, and what the manifest tells."""
    if as_json:
        print(json.dumps(asdict(summary)))
        return
    lengths = ", ".join(f"{name} {value:,.0f}" for name, value in summary.lengths.items())
    rows = {
        "documents": f"{summary.documents:,}"
        + (f", {summary.empty_documents:,} empty" * bool(summary.empty_documents)),
        "tokens": f"{summary.tokens:,} as {summary.dtype}",
        "tokens of a document": lengths or "none",
    }
    manifest = summary.manifest
    if manifest is None:
        rows["manifest"] = "none; --write-manifest --tokenizer DIR makes one"
    else:
        rows |= {
            "tokenizer": f"{manifest['tokenizer_digest'][:12]}, {manifest['vocab_size']:,} tokens",
            "EOS, BOS": f"{manifest['eos_id']}, {manifest['bos_id']}",
            "content": manifest["content_digest"],
            "loss mask": f"{manifest['loss_mask']} tokens count" + counted(manifest),
            "rejects": f"{manifest['rejects']:,}",
            "sources": "\n".join(f"{s['path']} ({s['bytes']:,} bytes)" for s in manifest["sources"]) or "not known",
        }
    words = shlex.quote(summary.prefix)
    print_table(summary.prefix, rows, f"python tools/inspect_data.py {words} --document 0 --tokenizer DIR")


def counted(manifest: dict) -> str:
    """How many tokens count for the loss, where that is known."""
    return "" if manifest["counted_tokens"] is None else f": {manifest['counted_tokens']:,}"


if __name__ == "__main__":
    sys.exit(run_tool(main))

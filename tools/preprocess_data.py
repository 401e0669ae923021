#!/usr/bin/env python
"""Text to a corpus that the trainer and Megatron-LM read: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and sys.platform == "linux" and not {"GLIBC_TUNABLES", "CPT_MEGA_AGAIN"} & os.environ.keys():
    # Memory in huge pages: a twentieth less time, as the kernel has a third of the pages to find. The C library asks for this
    # at the start of a process alone, so this one starts once more, as itself.
    os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "CPT_MEGA_AGAIN": "1"}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

try:
    import cpt_mega  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from cpt_mega.command_line import run_tool
from cpt_mega.data.manifest import ALL, MASKS
from cpt_mega.data.preprocess import (
    BOS_POLICIES,
    CHAT_FIELD,
    TEXT_FIELD,
    PreprocessOptions,
    PreprocessReport,
    preprocess,
)
from cpt_mega.data.progress import EncodingProgress
from cpt_mega.data.routes import AUTO, ROUTES
from cpt_mega.data.sources import source_line
from cpt_mega.data.units import PLANNERS

STOPPED = "interrupted; the same command goes on from here"
TERMINATED = 128 + signal.SIGTERM


def parse_arguments() -> PreprocessOptions:
    """The command line as options; argparse and InputError both end in exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=f"files ({', '.join(PLANNERS)}), or folders of texts")
    add("--tokenizer", required=True, metavar="DIR_OR_MODEL", help="HF folder or SentencePiece .model")
    add("--output", required=True, metavar="PREFIX", help="path of the corpus without .bin and .idx")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    add("--field", help=f"the key that holds the text (default: {TEXT_FIELD}; with --chat: {CHAT_FIELD})")
    add("--include", nargs="+", default=["*"], metavar="GLOB", help="names of files taken from folders (default: all)")
    add("--chat", action="store_true", help="documents are lists of messages; the tokenizer's template renders them")
    add("--loss-mask", choices=MASKS, default=ALL, help="tokens of a chat that count for the loss (default: all)")
    add("--bos", choices=BOS_POLICIES, default="auto", help="default: as the tokenizer itself does")
    add("--encoder", choices=[AUTO, *ROUTES], default=AUTO, help="default: the fastest that is exact")
    add("--max-reject-share", type=float, default=0.001, help="stop above it (default: 0.001)")
    add("--shard", type=shard, metavar="I/N", help="make only shard I (from 0) of N; tools/merge_shards.py joins them")
    add("--overwrite", action="store_true", help="replace a corpus that stands there")
    add("--reuse", action="store_true", help="keep an intact corpus that the same inputs made")
    values = vars(parser.parse_args())
    return PreprocessOptions(inputs=tuple(values.pop("input")), include=tuple(values.pop("include")), **values)


def shard(words: str) -> tuple[int, int]:
    """``I/N`` as numbers."""
    index, shards = words.split("/")
    return int(index), int(shards)


def show(report: PreprocessReport, console: Console) -> None:
    """The closing table and the line for the configuration."""
    manifest, input_bytes = report.manifest, sum(source["bytes"] for source in report.manifest.sources)
    if report.reused:
        console.print(f"{report.prefix}: made of the same inputs by the same tokenizer; kept as it is (--reuse)")
    for problem in report.passed_over:
        console.out(f"passed over {problem}", style="yellow", highlight=False)
    for reject in report.first_rejects:
        console.out(f"rejected {reject}", style="yellow", highlight=False)
    table = Table(title=report.prefix, show_header=False)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.rejects_by_reason.items())
    rate = "" if report.taken_up_bytes else f", {input_bytes / 1e6 / report.seconds:.1f} MB/s"
    rows = {
        "documents": f"{manifest.documents:,}",
        "rejects": f"{manifest.rejects:,}" + (f" ({reasons})" if reasons else ""),
        "tokens": f"{manifest.tokens:,} as {manifest.dtype}, EOS {manifest.eos_id}, BOS {manifest.bos_id}",
        "tokens per document": f"{manifest.tokens / max(manifest.documents, 1):,.1f}",
        "bytes per token": f"{manifest.token_bytes / max(manifest.tokens, 1):.2f}",
        "counts for the loss": f"{manifest.counted_tokens:,} tokens ({manifest.loss_mask})",
        "time": f"{report.seconds:.1f} s" + ("" if report.reused else f"{rate}, by {report.route}"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    counts = f"{manifest.documents_in:,} = {manifest.documents:,} + {manifest.rejects:,}"
    console.out(f"documents in = documents out + rejects: {counts}", highlight=False)
    if manifest.shard:
        console.out(
            f"shard {manifest.shard['index']} of {manifest.shard['shards']}; when all are there:", highlight=False
        )
        prefix = report.prefix.rpartition(".shard-")[0]
        console.out(f"next: python tools/merge_shards.py {shlex.quote(prefix)}", highlight=False)
    else:
        console.print("For data.sources in the configuration (a held-out corpus goes into eval.sets):")
        console.out(f"  - {source_line(report.prefix)}   # or replay, instruct", highlight=False)


def terminate(*_: object) -> None:
    """Ends the tool as an exception, so that workers end in order."""
    print(STOPPED, file=sys.stderr)
    sys.exit(TERMINATED)


def main() -> None:
    signal.signal(signal.SIGTERM, terminate)
    options = parse_arguments()
    with EncodingProgress() as progress:
        report = preprocess(options, progress)
    show(report, Console())


if __name__ == "__main__":
    sys.exit(run_tool(main, STOPPED))

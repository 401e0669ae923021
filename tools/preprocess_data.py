#!/usr/bin/env python
"""Text to a corpus that the trainer and Megatron-LM read: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json."""

import argparse
import os
import signal
import sys
from pathlib import Path

try:
    import cpt_mega  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from cpt_mega.data.preprocess import BOS_POLICIES, PreprocessOptions, PreprocessReport, preprocess
from cpt_mega.data.progress import EncodingProgress
from cpt_mega.data.routes import AUTO, ROUTES
from cpt_mega.errors import InputError

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def parse_arguments() -> PreprocessOptions:
    """The command line as options; argparse and InputError both end in exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL files, one document a line")
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_MODEL", help="HF folder or SentencePiece .model")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the corpus without .bin and .idx")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--field", default="text", help="the key that holds the text (default: text)")
    parser.add_argument("--bos", choices=BOS_POLICIES, default="auto", help="default: as the tokenizer itself does")
    parser.add_argument("--encoder", choices=[AUTO, *ROUTES], default=AUTO, help="default: the fastest that is exact")
    parser.add_argument("--max-reject-share", type=float, default=0.001, help="stop above it (default: 0.001)")
    parser.add_argument("--reuse", action="store_true", help="keep an intact corpus that the same inputs made")
    values = vars(parser.parse_args())
    return PreprocessOptions(inputs=tuple(values.pop("input")), **values)


def show(report: PreprocessReport, console: Console) -> None:
    """The closing table and the line for the configuration."""
    manifest, input_bytes = report.manifest, sum(source["bytes"] for source in report.manifest.sources)
    if report.reused:
        console.print(f"{report.prefix}: made of the same inputs by the same tokenizer; kept as it is (--reuse)")
    for problem in report.passed_over:
        console.print(f"passed over {problem}", style="yellow", markup=False)
    for reject in report.first_rejects:
        console.print(f"rejected {reject}", style="yellow", markup=False)
    table = Table(title=report.prefix, show_header=False)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.rejects_by_reason.items())
    rates = f"{input_bytes / 1e6 / report.seconds:.1f} MB/s, {manifest.tokens / report.seconds:,.0f} tokens/s"
    rows = {
        "documents": f"{manifest.documents:,}",
        "rejects": f"{manifest.rejects:,}" + (f" ({reasons})" if reasons else ""),
        "tokens": f"{manifest.tokens:,} as {manifest.dtype}, EOS {manifest.eos_id}, BOS {manifest.bos_id}",
        "tokens per document": f"{manifest.tokens / manifest.documents:,.1f}",
        "bytes per token": f"{manifest.token_bytes / manifest.tokens:.2f}",
        "time": f"{report.seconds:.1f} s" + ("" if report.reused else f", {rates}, by {report.route}"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    counts = f"{report.documents_in:,} = {manifest.documents:,} + {manifest.rejects:,}"
    console.out(f"documents in = documents out + rejects: {counts}", highlight=False)
    path = Path(report.prefix).resolve()
    console.print("For data.sources in the configuration (a held-out corpus goes into eval.sets):")
    console.out(f"  - {{name: {path.name}, path: {path}, role: domain}}   # or replay, instruct", highlight=False)


def main() -> int:
    """Runs the tool; returns its exit code."""
    # As an exception, so that what was begun is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        options = parse_arguments()
        with EncodingProgress(sum(os.path.getsize(path) for path in options.inputs)) as progress:
            report = preprocess(options, progress.advance)
        show(report, Console())
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print("error:", InputError("file", error.filename, f"{error.strerror}; give another path"), file=sys.stderr)
        return InputError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Imports a Hugging Face model as a checkpoint that the trainer starts from: file to file, no GPU."""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, print_table, run_tool  # noqa: E402
from cpt_mega.hf.convert import ImportReport, import_hf  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json, safetensors and tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint folder to make; must not exist")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args()


def show(report: ImportReport) -> None:
    rows = {
        "model": f"{report.family}, {report.parameters:,} parameters, {report.dtype}",
        "tensors": f"{report.tensors} read, each once; {report.core_tensors} written, each once",
        "padding": f"{report.padding_rows} zero rows of vocabulary (never exported)",
        "tokenizer": report.tokenizer_digest or "none in the folder",
        "base digest": report.base_digest,
        "speed": f"{report.bytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s, {report.seconds:.1f} s",
    }
    rows |= {f"dropped {name}": why for name, why in report.dropped.items()}
    next_command = f"bash launch/torchrun.sh CONFIG model.checkpoint={shlex.quote(str(report.output))}"
    print_table(f"imported {report.source} to {report.output}", rows, next_command)


def main() -> None:
    arguments = parse_arguments()
    with bytes_progress("importing") as progress:
        report = import_hf(arguments.hf, arguments.output, progress)
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        show(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

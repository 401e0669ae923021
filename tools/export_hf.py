#!/usr/bin/env python
"""Exports a checkpoint as a Hugging Face folder that transformers loads: file to file, no GPU."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import bytes_progress, print_table, run_tool  # noqa: E402
from cpt_mega.hf.convert import ExportReport, export_hf  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run (newest), an iter_* folder, an import"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; must not exist")
    parser.add_argument("--dtype", default="keep", choices=["keep", "float32", "bfloat16", "float16"])
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file (default 5)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args()


def show(report: ExportReport) -> None:
    rows = {
        "model": f"{report.family}, {report.parameters:,} parameters, {report.dtype}",
        "tensors": f"{report.core_tensors} read, each once; {report.tensors} written, each once",
        "weight files": len(report.files),
        "left out": f"{report.ignored} optimizer tensors",
        "speed": f"{report.bytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s, {report.seconds:.1f} s",
    }
    load = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({report.output!r}))"
    print_table(f"exported {report.source} to {report.output}", rows, f'python -c "{load}"')


def main() -> None:
    arguments = parse_arguments()
    with bytes_progress("exporting") as progress:
        report = export_hf(
            arguments.checkpoint, arguments.output, arguments.dtype, arguments.max_shard_gb * 1e9, progress
        )
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        show(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

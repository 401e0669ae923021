#!/usr/bin/env python
"""Has transformers compute an import's log-probabilities: a run that starts from it compares its own with them.

    python tools/check_parity.py IMPORT            # made by tools/import_hf.py, from a folder that is still there
    python tools/check_parity.py IMPORT --hf DIR   # the same folder, elsewhere

On the CPU, in fp32, so it takes four bytes a parameter. The values become part of the import and of its seal.
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
from cpt_mega.loop.parity import ParityReport, make_parity  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="IMPORT", help="folder made by tools/import_hf.py")
    parser.add_argument("--hf", metavar="DIR", help="the folder it was made from; default: where the import says")
    parser.add_argument(
        "--texts", metavar="FILE", help='JSONL of {"text": ...} or {"ids": [...]}; default: a few that come with it'
    )
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager", help="of transformers (eager)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args()


def show(report: ParityReport) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = {
        "from": report.source,
        "base digest": report.base_digest,
        "computed": f"{report.precision}, {report.attention} attention, {versions}",
        "texts": f"{report.texts}, prose and drawn ids; {report.tokens:,} tokens predicted, {report.mean_logprob:.3f} nats",
        "hidden states": f"of {report.layers} layers, the embedding and the final norm",
        "file": f"{report.path}, {report.bytes:,} bytes",
    }
    next_command = f"bash launch/torchrun.sh CONFIG model.checkpoint={shlex.quote(report.checkpoint)}"
    print_table(f"reference values of {report.checkpoint}", rows, next_command)


def main() -> None:
    arguments = parse_arguments()
    report = make_parity(arguments.checkpoint, arguments.hf, arguments.texts, arguments.attention)
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        show(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

#!/usr/bin/env python
"""The shards that tools/preprocess_data.py --shard made, as one corpus; no token is copied."""

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpt_mega.command_line import print_table, run_tool  # noqa: E402
from cpt_mega.data.indexed import shard_prefixes  # noqa: E402
from cpt_mega.data.shards import merge_shards  # noqa: E402
from cpt_mega.data.sources import source_line  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="the --output of the shards")
    parser.add_argument("--max-reject-share", type=float, default=0.001, help="refuse above it (default: 0.001)")
    arguments = parser.parse_args()
    prefix = arguments.prefix
    manifest = merge_shards(prefix, arguments.max_reject_share)
    rows = {
        "shards": f"{len(shard_prefixes(prefix)):,}",
        "documents in = out + rejects": f"{manifest.documents_in:,} = {manifest.documents:,} + {manifest.rejects:,}",
        "tokens": f"{manifest.tokens:,} as {manifest.dtype}",
        "content": manifest.content_digest,
    }
    print_table(prefix, rows, f"put into data.sources of the configuration: - {source_line(prefix)}")


if __name__ == "__main__":
    sys.exit(run_tool(main))

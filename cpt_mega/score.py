"""The public scorer: ``[torchrun ...] -m cpt_mega.score --checkpoint DIR --input FILE --output FILE [parallel.tp=2 ...]``.

Input JSONL, one packed row a line: ``{"id", "ids", "doc_lengths"}``. Output JSONL in the same order: the log-probability of
each token given the earlier tokens of its own document (null for the first), and the five likeliest next tokens at each
position, by the forward pass that training uses.
"""

import argparse
import sys
from collections.abc import Sequence

from cpt_mega.loop.entry import guarded, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, scores, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cpt_mega.score", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run, an iter_* folder, an import or an HF folder"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="JSONL of packed rows")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL of scores, in the same order")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="layout and precision, as in a configuration"
    )
    options = parser.parse_intermixed_args(arguments)

    def work() -> int:
        from cpt_mega.loop.scoring import score_file

        return score_file(options.checkpoint, options.input, options.output, options.overrides)

    return guarded(work, None)


if __name__ == "__main__":
    sys.exit(leave(main()))

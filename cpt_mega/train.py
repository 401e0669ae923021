"""The trainer: ``torchrun ... -m cpt_mega.train --config FILE [section.key=value ...]``.

Reads like a table of contents: configuration, checks, mesh, engine, restore, loop. Heavy imports stand inside functions:
megatron-core's checkpoint writer starts a helper process that imports this module again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cpt_mega.errors import ExitCode, InputError
from cpt_mega.loop.entry import guarded, is_main, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    options = _parse(arguments)
    try:
        from cpt_mega.config import load_config, resolved_yaml

        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(resolved_yaml(config), end="")
            return ExitCode.FINISHED
        if options.print_launch:
            print(config.parallel.model_size, config.run.dir)
            return ExitCode.FINISHED
    except InputError as error:
        return say(error)
    if options.dry_run:
        return guarded(lambda: _dry_run(config, options.world_size), None)
    earlier = _ended_before_restart(config)
    return earlier if earlier is not None else guarded(lambda: _train(config), config.run.dir)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cpt_mega.train", description="Continued pretraining on megatron-core."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--dry-run", action="store_true", help="check everything in one process, print the plan, stop")
    parser.add_argument(
        "--world-size", type=int, default=None, metavar="N", help="processes to plan for, with --dry-run"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--print-launch", action="store_true", help="print the processes a model replica needs and run.dir"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any configuration key")
    return parser.parse_intermixed_args(arguments)


def _train(config) -> int:
    from cpt_mega.loop.session import run_session

    state, reason = run_session(config, sys.argv[1:])
    if state == "finished" and config.checkpoint.export_hf == "final" and is_main():
        _export(config)
    return _exit_code(state)


def _export(config) -> None:
    """Writes the HF checkpoint once; other processes have ended, so no collective waits for it."""
    from cpt_mega.hf.convert import export_hf
    from cpt_mega.hf.locate import locate_checkpoint

    target = Path(config.run.dir) / "export"
    if not target.exists():
        export_hf(locate_checkpoint(config.run.dir), target)
    print(f" exported {target}", flush=True)


def _dry_run(config, world_size: int | None) -> int:
    from cpt_mega.loop.dry_run import print_plan

    print_plan(config, world_size or config.parallel.model_size)
    return ExitCode.FINISHED


def _ended_before_restart(config) -> int | None:
    """The code of a run that ended otherwise than by a fault, when torchrun restarts its workers all the same."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    from cpt_mega.loop.run_folder import read_status

    status = read_status(config.run.dir) or {}
    return None if status.get("state") in (None, "running", "fault") else status.get("exit_code")


def _exit_code(state: str) -> int:
    from cpt_mega.loop.run_folder import STATE_CODES

    return STATE_CODES[state]


if __name__ == "__main__":
    sys.exit(int(main()))

"""The trainer: ``torchrun ... -m cpt_mega.train --config FILE [section.key=value ...]``.

Reads like a table of contents: configuration, checks, mesh, engine, restore, loop. Heavy imports stand inside functions:
megatron-core's checkpoint writer starts a helper process that imports this module again.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from cpt_mega.errors import ExitCode, InputError
from cpt_mega.loop.entry import guarded, leave, restarts, say
from cpt_mega.loop.signals import StopRequest
from cpt_mega.parent import signal_when_parent_ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    options = _parse(arguments)
    try:
        from cpt_mega.config import explained_yaml, load_config

        config = load_config(options.config, options.overrides)
        if config.restore.is_new_run and restarts():
            options.overrides.append("restore.mode=auto")  # torchrun starts the same command again after a fault
            config = load_config(options.config, options.overrides)
        if options.accept:
            accepted = f"restore.accept=[{', '.join((*config.restore.accept, *options.accept))}]"
            config = load_config(options.config, [*options.overrides, accepted])
        if options.print_config:
            print(explained_yaml(config), end="")
            return ExitCode.FINISHED
        if options.print_launch:
            print(config.parallel.model_size, config.run.dir)
            return ExitCode.FINISHED
    except InputError as error:
        return say(error)
    if options.dry_run:
        return guarded(lambda: _dry_run(config, options), None)
    earlier = _ended_before_restart(config)
    if earlier is not None:
        return earlier
    if config.restore.is_new_run:  # which is refused once it has begun
        others = [word for word in options.overrides if not word.startswith("restore.mode=")]
        options.overrides = [*others, "restore.mode=auto"]
    command = _same_command(config, options, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_when_parent_ends(signal.SIGTERM)  # nobody watches a run whose launcher was killed, nor starts it again
    with StopRequest() as request:
        return guarded(lambda: _train(config, command, request), config.run.dir)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cpt_mega.train", description="Continued pretraining on megatron-core."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--dry-run", action="store_true", help="check everything in one process, print the plan, stop")
    parser.add_argument(
        "--world-size", type=int, default=None, metavar="N", help="processes to plan for, with --dry-run"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every option, its value and what it means, and stop",
    )
    parser.add_argument(
        "--print-launch", action="store_true", help="print the processes a model replica needs and run.dir"
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="OPTION",
        help="go on although this option differs from the checkpoint's, as train.tokens; may be given several times",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any configuration key")
    return parser.parse_intermixed_args(arguments)


def _train(config, command: str, request: StopRequest) -> int:
    from cpt_mega.engine.fast_paths import apply_environment

    apply_environment(config.parallel, config.train.deterministic)  # before anything starts CUDA
    # torch's flight recorder: the last collectives of each process, written where NCCL has waited too long
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", os.path.join(config.run.dir, "stacks", "nccl_rank_"))
    from cpt_mega.loop.run_folder import STATE_CODES
    from cpt_mega.loop.session import run_session

    state, _ = run_session(config, command, request)
    return STATE_CODES[state]


def _same_command(config, options: argparse.Namespace, here: int) -> str:
    """What starts this run (again) with ``here`` processes on this machine."""
    processes = f"NPROC={here} " if here != config.parallel.model_size else ""
    accepted = [word for name in options.accept for word in ("--accept", name)]
    return f"{processes}bash launch/torchrun.sh {shlex.join([options.config, *options.overrides, *accepted])}"


def _dry_run(config, options: argparse.Namespace) -> int:
    from cpt_mega.loop.dry_run import print_plan

    world = config.parallel.model_size if options.world_size is None else options.world_size
    if world < 1:
        raise InputError("--world-size", world, "give the number of processes to plan for, at least 1")
    print_plan(config, world, _same_command(config, options, world))
    return ExitCode.FINISHED


def _ended_before_restart(config) -> int | None:
    """The code of a run that ended otherwise than by a fault, when torchrun restarts its workers all the same."""
    if not restarts():
        return None
    import psutil

    from cpt_mega.loop.run_folder import ended_since, read_status

    status = read_status(config.run.dir) or {}
    launched = psutil.Process(os.getppid()).create_time()  # what stands there from before is an earlier launch's end
    if status.get("state") == "fault" or not ended_since(config.run.dir, launched):
        return None
    return status.get("exit_code")


if __name__ == "__main__":
    sys.exit(leave(main()))

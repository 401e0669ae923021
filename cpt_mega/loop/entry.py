"""What the entry modules share: an error becomes one line, a status and an exit code. Imports nothing heavy."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cpt_mega.errors import CptMegaError, ExitCode, InputError
from cpt_mega.loop.noise import quieten
from cpt_mega.loop.run_folder import RunFolder, ended_since, read_status

_STARTED = time.time()


def guarded(work: Callable[[], int], run_dir: str | None) -> int:
    """Runs; an error becomes one line (or a traceback for a fault), a status and an exit code."""
    quieten()
    try:
        return work()
    except KeyboardInterrupt:
        return _record(run_dir, "preempted", "interrupted", ExitCode.PREEMPTED)
    except InputError as error:
        say(error)
        return _record(run_dir, "config_error", str(error), error.exit_code)
    except CptMegaError as error:
        print(f"fault: {error}", file=sys.stderr, flush=True)
        return _record(run_dir, "fault", str(error), error.exit_code)
    except Exception as error:  # a worker must end with the fault code, whatever went wrong
        traceback.print_exc()
        return _record(run_dir, "fault", f"{type(error).__name__}: {error}", ExitCode.FAULT)


def _record(run_dir: str | None, state: str, reason: str, code: ExitCode) -> int:
    """Puts an end that the loop did not see into ``status.json``, keeping the step it had come to.

    Any process does it, because the main one may be stopped by torchrun before it can; the first one's reason stands,
    since the others fail for want of it.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        before = read_status(folder) or {}
        if not ended_since(folder, _STARTED):
            keep = (
                before.get("step", 0),
                before.get("tokens", 0),
                before.get("run_id", ""),
                before.get("next_command", ""),
            )
            with contextlib.suppress(OSError):  # a folder that cannot be written may be the very error
                folder.mkdir(parents=True, exist_ok=True)
                RunFolder(folder, writes=True).status(state, reason, *keep)
    return code


def say(error: InputError) -> int:
    """Prints the line once, on the main process; returns its exit code."""
    if is_main():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def is_main() -> bool:
    """Whether this is the process that speaks; asked of torchrun's environment."""
    return os.environ.get("RANK", "0") == "0"

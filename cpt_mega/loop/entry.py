"""What the entry modules share: an error becomes one line, a status and an exit code. Imports nothing heavy."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cpt_mega.errors import CptMegaError, ExitCode, FaultError, FolderLost, InputError
from cpt_mega.loop.lease import LEASE
from cpt_mega.loop.noise import quieten
from cpt_mega.loop.run_folder import RunFolder, ended_since, opened_here, read_status
from cpt_mega.loop.signals import ASKING

_STARTED = time.time()
_AFTER_MAIN_S = 3.0
_interrupted = False


def guarded(work: Callable[[], int], run_dir: str | None) -> int:
    """Runs; an error becomes one line (or a traceback for a fault), a status and an exit code."""
    global _interrupted
    quieten()
    try:
        return work()
    except KeyboardInterrupt:
        _interrupted = True
        return _record(run_dir, "preempted", "interrupted", ExitCode.PREEMPTED)
    except InputError as error:
        say(error)
        return _record(run_dir, "config_error", str(error), error.exit_code)
    except CptMegaError as error:
        print(f"{_who()}fault: {error}", file=sys.stderr, flush=True)
        if isinstance(error, FolderLost):  # the status there is another run's
            return error.exit_code
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
        # an error in the configuration says nothing of a run that stands in the folder, unless it is this very one; nor
        # does an interrupted wait for the run that owns it
        stands = {"config_error": bool(before), "preempted": (folder / LEASE).exists()}.get(state, False)
        mistaken = stands and not opened_here(folder)
        if not mistaken and not ended_since(folder, _STARTED):
            keep = (
                before.get("step", 0),
                before.get("tokens", 0),
                before.get("run_id", ""),
                before.get("next_command", ""),
            )
            with contextlib.suppress(OSError, FaultError):  # a folder that cannot be written may be the very error
                folder.mkdir(parents=True, exist_ok=True)
                RunFolder(folder, writes=True).status(state, reason, *keep)
    return code


def say(error: InputError) -> int:
    """Prints the error as one line; returns its exit code. What every process meets alike, the main one says first."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_AFTER_MAIN_S)  # torchrun ends the others as soon as one has ended
    print(f"{_who()}error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def leave(code: int) -> int:
    """Hands the exit code to the launcher, which cannot learn it from torchrun; returns it for ``sys.exit``.

    The first process that ends otherwise than well decides: the others fail for want of it. Where torchrun restarts them, the
    last start decides. What comes now does not change how the run has ended, so signals are passed over; an interrupted
    process waits for no thread of its own any more.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    handover = os.environ.get("CPT_MEGA_EXIT_CODE_FILE")
    if handover and code:
        with contextlib.suppress(OSError), open(handover, "a") as stream:
            stream.write(f"{restarts()} {int(code)}\n")
    if _interrupted:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
    return int(code)


def restarts() -> int:
    """How often torchrun has restarted the processes of this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _who() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "

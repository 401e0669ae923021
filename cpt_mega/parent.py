"""What becomes of a process whose parent ends without a word, as by ``kill -9``."""

import ctypes
import os

_prctl = ctypes.CDLL(None).prctl  # looked up here: in a forked child it would take the loader's lock
_PDEATHSIG = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def signal_when_parent_ends(number: int) -> None:
    """This process gets a signal when the thread that started it ends, so also with the process that the thread is of."""
    _prctl(_PDEATHSIG, number)


def is_orphan(parent: int) -> bool:
    """Whether the process that started this one, ``os.getpid()`` there, has ended before this one asked for its signal."""
    return os.getppid() != parent

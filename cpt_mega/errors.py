"""The ways a run can end, as exit codes and as exceptions.

Every error that a user can cause carries the field, the value and the fix, and prints as one line.
"""

from enum import IntEnum

_MOST_SHOWN = 1000  # characters of a value


class ExitCode(IntEnum):
    """Exit codes of the trainer; launchers and job scripts rely on them."""

    FINISHED = 0
    CONFIG_ERROR = 2
    FAULT = 70
    PREEMPTED = 75
    GATE_STOP = 80


class CptMegaError(Exception):
    """Base of this project's own errors."""

    exit_code = ExitCode.FAULT


class InputError(CptMegaError):
    """Something the user gave is wrong: a configuration value, a file, a combination.

    Args:
        field: the configuration key, option or file that is wrong.
        value: what was given.
        fix: what to change, as a sentence.
    """

    exit_code = ExitCode.CONFIG_ERROR

    def __init__(self, field: str, value: object, fix: str):
        self.field, self.value, self.fix = field, value, fix
        super().__init__(f"{field} = {_shown(value)}: {fix}")

    def __reduce__(self):
        return type(self), (self.field, self.value, self.fix)  # worker processes raise it too


def _shown(value: object) -> str:
    """The value in one line that stays readable, whatever a damaged file held."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 4]} ..."


class CheckpointError(InputError):
    """A checkpoint folder is missing, incomplete, damaged, or does not fit the model."""


class FaultError(CptMegaError):
    """The run cannot go on (non-finite loss, a rank that differs): the last checkpoint is intact."""


class SaveStalled(FaultError):
    """A process that wrote a checkpoint came to a standstill and was ended; the save can be begun again."""


class RollBack(CptMegaError):
    """The run is to go on from an earlier checkpoint, as its ledger says; the processes stay."""


class FolderLost(FaultError):
    """The run folder is another run's by now: this one writes nothing more there, not even that it has ended.

    Args:
        folder: the run folder.
        how: who has it, as a part of a sentence.
    """

    def __init__(self, folder: object, how: str):
        super().__init__(f"the run folder {folder} is no longer this run's: {how}; this run saved nothing more there")

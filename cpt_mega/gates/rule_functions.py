"""Rules of the user's own, as Python functions."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from cpt_mega.errors import InputError
from cpt_mega.gates.verdict import ACTIONS, CONTINUE, HARD, NONE, SOFT, WARN, LookScores, Verdict

Rule = Callable[[LookScores, Sequence[Mapping]], tuple[str, str] | None]


@lru_cache(maxsize=64)
def load_function(name: str) -> Rule:
    """A rule of the user's own: ``rule(look: LookScores, history) -> (action, reason)``, or None where all is well.

    Args:
        name: ``path/to/file.py:function``. ``history`` are the looks before, as the run's state keeps them.

    Raises InputError for a file or a function that is not there, and a file that cannot be imported.
    """
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location(f"cpt_mega_rule_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, function)
    except Exception as error:  # the user's own code
        fix = f"cannot be used ({type(error).__name__}: {error}); give path/to/file.py:function"
        raise InputError("rules.functions", name, fix) from error
    if not callable(found):
        raise InputError("rules.functions", name, f"{function} is no function")
    return found


def verdict_by_function(name: str, look: LookScores, history: Sequence[Mapping]) -> Verdict:
    """What such a rule says. Raises InputError as ``load_function``, and for a function that fails or says something else."""
    rule = f"function:{name.rpartition(':')[2]}"
    try:
        said = load_function(name)(look, history)
    except InputError:
        raise
    except Exception as error:  # the user's own code
        raise InputError("rules.functions", name, f"failed at step {look.step}: {error!r}; mend it") from error
    if said is None:
        return Verdict(rule, NONE, CONTINUE, "")
    if not (isinstance(said, tuple) and len(said) == 2 and said[0] in ACTIONS and isinstance(said[1], str)):
        fix = f"gave {said!r}; give None, or an action ({', '.join(ACTIONS)}) and a reason"
        raise InputError("rules.functions", name, fix)
    level = {CONTINUE: NONE, WARN: SOFT}.get(said[0], HARD)
    return Verdict(rule, level, *said)

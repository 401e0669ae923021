"""Rules of the user's own, as Python functions."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from cpt_mega.errors import InputError
from cpt_mega.gates.verdict import ACTIONS, CONTINUE, HARD, NONE, SOFT, WARN, LookScores, Verdict
from cpt_mega.lineage import file_digest, text_digest

Rule = Callable[[LookScores, Sequence[Mapping]], tuple[str, str] | None]
SEEN = ("step", "tokens", "perplexity", "action", "objections")  # of a look, by those that come later


def seen(look: Mapping) -> dict:
    """What rules may know of an earlier look, as a copy: all of it is in the ledger, so a verdict can be taken again.

    Keys: ``step``, ``tokens``, ``perplexity`` by bucket, the ``action``, and ``objections``: the level (soft, hard) by rule.
    """
    return copy.deepcopy({"objections": {}} | {name: look[name] for name in SEEN if name in look})


@lru_cache(maxsize=64)
def load_function(name: str) -> Rule:
    """A rule of the user's own: ``rule(look: LookScores, history) -> (action, reason)``, or None where all is well.

    Args:
        name: ``path/to/file.py:function``. ``history`` are the looks before, oldest first, each as ``seen`` gives it.

    Raises InputError for a file or a function that is not there, and a file that cannot be imported.
    """
    path, _, function = name.rpartition(":")
    try:
        found = getattr(_imported(Path(path).resolve())[0], function)
    except Exception as error:  # the user's own code
        fix = f"cannot be used ({type(error).__name__}: {error}); give path/to/file.py:function"
        raise InputError("rules.functions", name, fix) from error
    if not callable(found):
        raise InputError("rules.functions", name, f"{function} is no function")
    return found


@lru_cache(maxsize=64)
def _imported(path: Path) -> tuple[ModuleType, str]:
    """A file, imported under a name that no other file has, and its digest at that moment; dataclasses, for one, look their
    module up by its name."""
    name = f"cpt_mega_rule_{text_digest(str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        digest = file_digest(path)
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module, digest


def rule_name(name: str) -> str:
    """What a function's rule is called in verdicts and objections: ``function:FILE.NAME``, FILE without folder and ``.py``."""
    path, _, function = name.rpartition(":")
    return f"function:{Path(path).stem}.{function}"


def function_digest(name: str) -> str | None:
    """Of the file that a function is in, as it was when it was imported; None where it cannot be."""
    try:
        load_function(name)
    except InputError:
        return None
    return _imported(Path(name.rpartition(":")[0]).resolve())[1]


def check_names(functions: Sequence[str]) -> None:
    """Raises InputError for two functions whose rules would have one name: one's verdicts would be taken for the other's."""
    known: dict[str, str] = {}
    for name in functions:
        rule = rule_name(name)
        if rule in known:
            fix = f"is called {rule} in verdicts, and so is {known[rule]}; name another, or rename the file or the function"
            raise InputError("rules.functions", name, fix)
        known[rule] = name


def verdict_by_function(name: str, look: LookScores, history: Sequence[Mapping]) -> Verdict:
    """What such a rule says; of each look in ``history`` it is given what ``seen`` leaves.

    Raises InputError as ``load_function``, and for a function that fails or says something else.
    """
    rule = rule_name(name)
    try:
        said = load_function(name)(look, [seen(past) for past in history])
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

"""The contract of a restore: what becomes of each item of a run's state, and what a differing option means for it.

A full restore goes on with a run, so an option that would make it another experiment is refused until it is accepted by
name, and what the stored state cannot be read under is refused for good. Everything is collected before anything is
refused, so that a user sees all of it at once.
"""

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from cpt_mega.config.load import differing_fields
from cpt_mega.engine.core_options import NUMERIC
from cpt_mega.errors import InputError

FATAL, ASKED, EFFECT, HARMLESS = "fatal", "needs acceptance", "takes effect", "harmless"

# What it means for a run that goes on when an option, or any within a section, has another value. The longest name decides.
CLASSES = {
    "run": HARMLESS,
    "model.checkpoint": HARMLESS,  # a place; the model that lies there is compared by its content
    "tokenizer.path": HARMLESS,  # likewise
    "restore": HARMLESS,
    "parallel": HARMLESS,
    "precision": ASKED,
    "train": ASKED,
    "train.micro_batch_size": HARMLESS,
    "train.recompute": HARMLESS,
    "train.deterministic": HARMLESS,
    "train.gc_interval_steps": HARMLESS,
    "train.replica_check_steps": HARMLESS,
    "train.distributed_optimizer": FATAL,  # the two keep different tensors, so one cannot read what the other wrote
    "optimizer": ASKED,
    "schedule": ASKED,
    "data": ASKED,
    **{f"data.{name}": EFFECT for name in ("max_epochs", "at_max_epochs", "row_checks", "exclude")},
    "checkpoint": EFFECT,
    "eval": EFFECT,
    "eval.sets": ASKED,
    "eval.max_tokens": ASKED,
    "gates": EFFECT,
    "anomaly": EFFECT,
    "logging": HARMLESS,
    "profile": HARMLESS,
    "core": HARMLESS,
    **dict.fromkeys(NUMERIC, ASKED),
}
_EXCLUDE = "data.exclude."


class Row(NamedTuple):
    """A line of the contract. ``what``: restored, fresh, refused, accepted, takes effect or harmless."""

    item: str
    what: str
    note: str


@dataclass
class Contract:
    """Rows in the order they are printed, and an error for each thing that is refused."""

    accept: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    refusals: list[InputError] = field(default_factory=list)
    _could_be_accepted: list[str] = field(default_factory=list, init=False)

    def add(self, item: str, what: str, note: str = "") -> None:
        self.rows.append(Row(item, what, note))

    def refuse(self, item: str, note: str, error: InputError) -> None:
        self.rows.append(Row(item, "refused", note))
        self.refusals.append(error)

    def ask(self, name: str, value: object, why: str, item: str = "", note: str = "") -> None:
        """Refuses unless ``name`` is accepted.

        Args:
            why: what differs; it ends where the fix begins.
            item: what the row is called, if not as the option.
            note: of the row, if not ``why``.
        """
        item, note = item or name, note or why
        if accepts(self.accept, name):
            self.add(item, "accepted", note)
        else:
            self.refuse(item, note, InputError(item, value, f"{why}; {_ways_out(name)}"))
            self._could_be_accepted.append(name)

    def check(self) -> None:
        """Raises the first refusal as InputError (field, value, fix), and says how many more there are and what accepts all."""
        if not self.refusals:
            return
        first, more = self.refusals[0], len(self.refusals) - 1
        if not more:
            raise first
        names = dict.fromkeys(self._could_be_accepted)
        flags = f"; what can be accepted: {' '.join(f'--accept {name}' for name in names)}" if names else ""
        raise type(first)(first.field, first.value, f"{first.fix} ({more} more in the table above{flags})")

    def differences(self, before: dict, now: dict, excluded: dict) -> None:
        """A row for each option that differs between two resolved configurations.

        ``excluded``: rows that the run excludes already, by source; they stay so, whatever a configuration says later.
        """
        for name, old, new in differing_fields(before, now):
            if name.startswith(_EXCLUDE):
                kept = set(excluded.get(name.removeprefix(_EXCLUDE)) or ())
                more = len(set(new or ()) - kept)
                self.add(name, EFFECT, f"{len(kept)} rows stay excluded, {more} more from here on")
            elif class_of(name) == ASKED:
                why = f"the checkpoint was trained with {short(old)}"
                self.ask(name, new, why, note=f"{short(old)} is now {short(new)}")
            elif class_of(name) == FATAL:
                self.fatal(name, old, new)
            else:
                self.add(name, class_of(name), f"{short(old)} is now {short(new)}")

    def fatal(self, name: str, old: object, new: object) -> None:
        """Refuses another value for good."""
        fix = f"the checkpoint was trained with {short(old)} and can only go on so; restore it, or start a new run"
        self.refuse(name, f"{short(old)} is now {short(new)}", InputError(name, new, fix))


def class_of(name: str) -> str:
    """The class of an option, by the longest entry of CLASSES that is it or holds it."""
    found = [entry for entry in CLASSES if name == entry or name.startswith(f"{entry}.")]
    return CLASSES[max(found, key=len)]


def accepts(accepted: tuple[str, ...], name: str) -> bool:
    """Whether a name was accepted, itself or the section it is in."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in accepted)


def _ways_out(name: str) -> str:
    return (
        f"restore that, accept the change with --accept {name}, or start a new run with restore.mode=weights and another "
        "run.dir"
    )


def short(value: object) -> str:
    """A value as a configuration would have it, on one line at most; lists of options can be long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."

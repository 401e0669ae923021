"""What a checkpoint folder says of itself, from its JSON alone: fast, without torch, and for the folders of older code too.

Nothing here refuses a field that is missing or of another type: who looks into a folder wants to see what there is. What a run
restores from is read by ``trainer_state`` instead, which does refuse.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_mega.checkpoint.trainer_state import STATE_FILE, TrainerState, has_state
from cpt_mega.errors import CheckpointError
from cpt_mega.hf.locate import CHECKPOINTS, iteration_folders, locate_checkpoint
from cpt_mega.hf.model_info import MODEL_FILE
from cpt_mega.json_types import type_problem
from cpt_mega.lineage import is_complete, read_json


@dataclass(frozen=True)
class Reading:
    """A perplexity at a checkpoint's step, that of step 0, and how much higher it is than that, as a share; None: not known."""

    perplexity: float
    baseline: float | None
    rise: float | None


@dataclass(frozen=True)
class Record:
    """What a folder records. A value that is None was not recorded: an import has no run, older code wrote less.

    Attributes:
        folder: of the checkpoint.
        model: ``model.json``; empty where there is none.
        state: ``trainer_state.json``; empty for an import.
    """

    folder: Path
    model: dict
    state: dict

    @property
    def is_import(self) -> bool:
        """Whether it is weights alone."""
        return not self.state

    @property
    def is_sealed(self) -> bool:
        return is_complete(self.folder)

    @property
    def run_dir(self) -> Path:
        """The run folder that it lies in; the folder itself where that is none."""
        root = self.folder.parent
        return root.parent if root.name == CHECKPOINTS else self.folder

    @property
    def run_id(self) -> str | None:
        return _typed(self.state.get("run_id"), str)

    @property
    def parent(self) -> str | None:
        """Path of the checkpoint that the run's weights came from, as it was when the run began."""
        return _typed(self.state.get("parent"), str)

    @property
    def step(self) -> int | None:
        return _typed(self.state.get("step"), int)

    @property
    def tokens(self) -> int | None:
        return _typed(self.state.get("tokens"), int)

    @property
    def kind(self) -> str | None:
        return _typed(self.state.get("kind"), str)

    @property
    def lineage(self) -> dict:
        return _typed(self.state.get("lineage"), dict) or {}

    @property
    def config(self) -> dict:
        return _typed(self.state.get("config"), dict) or {}

    @property
    def weights(self) -> str | None:
        """The recorded name of its weights."""
        return _typed(self.lineage.get("weights"), str)

    @property
    def parent_weights(self) -> str | None:
        """The name of the weights that the run began with, in the precision that it trains in."""
        return _typed(self.lineage.get("parent_weights"), str)

    @property
    def base_digest(self) -> str | None:
        """The name of the Hugging Face files that it all began with."""
        return _typed(self.model.get("base_digest"), str) or _typed(self.lineage.get("base_digest"), str)

    @property
    def tokenizer_digest(self) -> str | None:
        return _typed((self.model if self.is_import else self.lineage).get("tokenizer_digest"), str)

    @property
    def tokens_by_source(self) -> dict[str, int] | None:
        """Tokens drawn from each source."""
        sources = (_typed(self.state.get("stream"), dict) or {}).get("sources")
        if not isinstance(sources, dict):
            return None
        return {name: one["tokens"] for name, one in sources.items() if isinstance(one, dict) and "tokens" in one}

    @property
    def health(self) -> str | None:
        """As ``TrainerState`` has it."""
        looks = self._looks()
        return None if looks is None else TrainerState("", "", step=self.step or 0, gate_history=looks).health

    @property
    def readings(self) -> dict[str, Reading]:
        """What the gates read at this very step, by bucket; empty where they did not look."""
        here = [look for look in self._looks() or () if look["step"] == self.step]
        values = _typed(here[-1].get("perplexity"), dict) if here else None
        baseline = _typed(self.state.get("baseline"), dict) or {}
        return {bucket: _reading(value, baseline.get(bucket)) for bucket, value in (values or {}).items()}

    def to_json(self) -> dict:
        """What a look at many checkpoints needs of each."""
        names = ("run_id", "step", "tokens", "kind", "health", "weights", "base_digest")
        readings = {bucket: asdict(reading) for bucket, reading in self.readings.items()}
        return {"path": str(self.folder), **{name: getattr(self, name) for name in names}, "readings": readings}

    def _looks(self) -> list[dict] | None:
        looks = _typed(self.state.get("gate_history"), list)
        return looks and [look for look in looks if isinstance(look, dict) and {"step", "action"} <= look.keys()]


def find_record_folder(path: str | Path) -> Path:
    """The folder that ``path`` means: an import or an ``iter_*`` folder, sealed or not; of a run the newest complete one.

    Raises CheckpointError as ``locate_checkpoint`` does.
    """
    return Path(path) if holds_record(Path(path)) else locate_checkpoint(path)


def holds_record(folder: Path) -> bool:
    """Whether a folder is an import or a checkpoint, sealed or not."""
    return has_state(folder) or (folder / MODEL_FILE).is_file()


def read_record(folder: Path) -> Record:
    """Raises CheckpointError where neither file is there, or one is no JSON object."""
    if not holds_record(folder):
        raise CheckpointError("checkpoint", str(folder), f"holds neither {MODEL_FILE} nor {STATE_FILE}; name another")
    return Record(folder, _read(folder / MODEL_FILE), _read(folder / STATE_FILE))


def run_checkpoints(run_dir: Path) -> list[Path]:
    """``iter_*`` folders of a run or of its ``checkpoints`` folder, oldest first, sealed or not; empty for anything else."""
    root = run_dir / CHECKPOINTS if (run_dir / CHECKPOINTS).is_dir() else run_dir
    return iteration_folders(root)[::-1]


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint", str(path), f"cannot be read ({error}); name another") from error
    if not isinstance(value, dict):
        raise CheckpointError("checkpoint", str(path), f"is a {type(value).__name__}, not an object; name another")
    return value


def _typed(value: Any, kind: type) -> Any:
    """The value if it is of a kind, else None; true and false are no numbers."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _reading(perplexity: float, baseline: float | None) -> Reading:
    numbers = all(type_problem(value, float) is None for value in (perplexity, baseline))
    return Reading(perplexity, baseline, perplexity / baseline - 1 if numbers and baseline else None)

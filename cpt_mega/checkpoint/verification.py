"""Whether a folder still is the checkpoint that was sealed: its files by the seal, its tensors by their fingerprints.

The two check different things. The seal is over bytes, so it finds any damage of a file, and files that came or went. The
fingerprints are of the values that the run had in memory when it saved, so they hold where a folder was sealed again over
something else. Whatever is wrong is collected, by the name of the file or the tensor; memory is bounded by one stored chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cpt_mega.checkpoint.record import holds_record, read_record, run_checkpoints
from cpt_mega.checkpoint.trainer_state import STATE_FILE
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.convert import check_index, check_model_files
from cpt_mega.hf.families import tensor_map
from cpt_mega.hf.fingerprint import Fingerprint
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import MODEL_FILE
from cpt_mega.hf.torch_dist import read_index
from cpt_mega.hf.untrusted import INDEX_FILE
from cpt_mega.hf.weights import FINGERPRINTS, ModelNames, model_digest, stored_fingerprints
from cpt_mega.lineage import COMPLETE, MANIFEST, damaged_files, folder_files, is_complete, read_json, sealed_files

OPTIMIZER = "optimizer."
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Problem:
    """``what`` (a file or a tensor) is not as it should be, in words."""

    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


@dataclass
class Verification:
    """What was found of one folder.

    Attributes:
        type: checkpoint, import or hf.
        step: of a run's checkpoint.
        weights: the name of the weights that lie there; None where they cannot be read.
        recorded: the name that the checkpoint says; None where it says none.
        checked, not_checked: a sentence each.
    """

    path: str
    type: str
    step: int | None = None
    weights: str | None = None
    recorded: str | None = None
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems

    def to_json(self) -> dict:
        return {"good": self.is_good, **asdict(self)}

    def expect(self, name: str) -> None:
        """Adds a problem where the weights have another name than one that begins so."""
        if self.weights is not None and not self.weights.startswith(name):
            self.problems.append(Problem("weights", f"their name is {self.weights}, not {name}"))


def folders_to_verify(path: str | Path, every: bool = False) -> list[Path]:
    """The folder that ``path`` means: an HF folder, an import, an ``iter_*`` folder, or a run's newest complete checkpoint.

    Args:
        every: all ``iter_*`` folders of a run instead, oldest first, sealed or not.

    Raises InputError (CheckpointError) where there is none.
    """
    path = Path(path)
    if every:
        folders = run_checkpoints(path) if path.is_dir() else []
        if not folders:
            raise InputError("--all", str(path), "holds no iter_* folder; --all goes with a run")
        return folders
    if _is_hf(path) or holds_record(path):
        return [path]
    return [locate_checkpoint(path)]


def verify(folder: Path, progress: Progress | None = None) -> Verification:
    """Checks everything about one folder that can be checked. Problems are returned; raises InputError for an HF folder that
    cannot be read, as there is nothing to hold it against."""
    if _is_hf(folder):
        return _verify_hf(folder, progress)
    return _Verifying(folder, progress or (lambda done, total: None)).run()


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not holds_record(folder)


def _verify_hf(folder: Path, progress: Progress | None) -> Verification:
    name = model_digest(folder, progress)
    left = "a Hugging Face folder has no seal and records no name: there is nothing to hold it against"
    return Verification(str(folder), "hf", weights=name, checked=["every tensor was read"], not_checked=[left])


class _Verifying:
    """One folder on its way; each step adds to ``found`` and gives what the next needs, or None."""

    def __init__(self, folder: Path, progress: Progress):
        self._folder = folder
        self.found = Verification(str(folder), "checkpoint")
        self._progress = progress
        self._size = sum((folder / name).stat().st_size for name in folder_files(folder))

    def run(self) -> Verification:
        self._record()
        self._files()
        names, index = self._model()
        if index is not None:
            stored = self._read(names, index)
            self._compare(names, index, stored)
        return self.found

    def _problem(self, what: str, text: object) -> None:
        self.found.problems.append(Problem(what, " ".join(str(text).split())))

    def _record(self) -> None:
        try:
            record = read_record(self._folder)
        except CheckpointError as error:
            self._problem(STATE_FILE, error)
            return
        self.found.type = "import" if record.is_import else "checkpoint"
        self.found.step, self.found.recorded = record.step, record.weights

    def _files(self) -> None:
        """Sizes and digests by the seal, and files that it does not know."""
        if not is_complete(self._folder):
            self._problem(COMPLETE, "the folder is not sealed: whoever wrote it did not finish")
            return
        try:
            sealed = sealed_files(self._folder)
        except CheckpointError as error:
            self._problem(MANIFEST, error.fix)
            return
        done = 0
        for name, entry in sorted(sealed.items()):
            if damaged_files(self._folder, {name: entry}):
                self._problem(name, self._damage(name, entry["bytes"]))
            done += entry["bytes"]
            self._progress(done, max(done, 2 * self._size))
        for name in sorted(set(folder_files(self._folder)) - sealed.keys()):
            self._problem(name, "is in the folder and not in its seal")
        self.found.checked.append(f"{len(sealed)} files by size and SHA-256, and that there is no other")

    def _damage(self, name: str, size: int) -> str:
        path = self._folder / name
        if not path.is_file():
            return "is missing"
        now = path.stat().st_size
        return "is not what was sealed: another SHA-256" if now == size else f"has {now:,} bytes, {size:,} were sealed"

    def _model(self) -> tuple[ModelNames | None, Mapping | None]:
        """The model's names and the index, where these can be read; whether they, and the HF configuration, fit together."""
        try:
            info, _ = check_model_files(self._folder)
        except InputError as error:
            self._problem(MODEL_FILE, error)
            info = None
        try:
            index = read_index(self._folder)
        except CheckpointError as error:
            self._problem(INDEX_FILE, error.fix)
            return None, None
        if info is None:
            self.found.not_checked.append("tensors: the model is not known")
            return None, None
        mapped = tensor_map(info.shape)
        try:
            model_keys = {key: entry for key, entry in index.items() if not key.startswith(OPTIMIZER)}
            check_index(self._folder, mapped, model_keys)
        except InputError as error:
            self._problem(INDEX_FILE, error)
            self.found.not_checked.append("tensors: they are not those of the model")
            return None, None
        self.found.checked.append(f"{MODEL_FILE} against hf/config.json, and the index against both")
        return ModelNames(mapped), index

    def _read(self, names: ModelNames, index: Iterable[str]) -> dict[str, Fingerprint]:
        """Fingerprints of every tensor that can be read."""

        def progress(done: int, total: int) -> None:
            self._progress(int(self._size * (1 + done / total)), 2 * self._size)

        try:
            return stored_fingerprints(self._folder, index, names, progress=progress)
        except CheckpointError:  # which one was it?
            return dict(self._readable(names, index))

    def _readable(self, names: ModelNames, index: Iterable[str]) -> Iterator[tuple[str, Fingerprint]]:
        for key in sorted(index):
            try:
                yield key, stored_fingerprints(self._folder, [key], names)[key]
            except CheckpointError as error:
                self._problem(f"tensor {key}", error.fix)

    def _compare(self, names: ModelNames, index: Iterable[str], stored: Mapping[str, Fingerprint]) -> None:
        recorded = self._recorded_fingerprints()
        if recorded is not None:
            for key in sorted(set(index) - recorded.keys()):
                self._problem(FINGERPRINTS, f"has no tensor {key}, which is in the folder")
            for key in sorted(recorded.keys() - set(index)):
                self._problem(f"tensor {key}", f"is in {FINGERPRINTS} and not in the folder")
            both = [key for key in sorted(stored) if key in recorded]
            for key in both:
                if str(stored[key]) != recorded[key]:
                    self._problem(f"tensor {key}", f"its values are not those that {FINGERPRINTS} records")
            self.found.checked.append(f"{len(both)} tensors against {FINGERPRINTS}")
        if names.rows.keys() <= stored.keys():
            self.found.weights = names.digest(stored)
            self._compare_name()

    def _recorded_fingerprints(self) -> dict[str, str] | None:
        path = self._folder / FINGERPRINTS
        if not path.is_file():
            why = "an import records none" if self.found.type == "import" else "none are recorded, as by older code"
            self.found.not_checked.append(f"values of tensors against fingerprints: {why}")
            return None
        try:
            return {key: str(Fingerprint.parse(text)) for key, text in read_json(path).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self._problem(FINGERPRINTS, f"cannot be read ({error})")
            return None

    def _compare_name(self) -> None:
        found = self.found
        if found.recorded is None:
            why = "an import records none" if found.type == "import" else "none is recorded, as by older code"
            found.not_checked.append(f"the name of the weights: {why}")
        elif found.recorded != found.weights:
            self._problem(STATE_FILE, f"says that the weights are {found.recorded}; they are {found.weights}")
        else:
            found.checked.append(f"the name of the weights against {STATE_FILE}")

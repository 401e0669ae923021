"""``model.json`` and ``hf/``: what a checkpoint folder says of its model, besides the tensors.

An import writes them; a trainer's checkpoints carry copies, so that any of them can be exported on its own.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.shape import ModelShape
from cpt_mega.json_types import type_problem
from cpt_mega.lineage import file_digest, read_json, write_json

MODEL_FILE = "model.json"
HF_FOLDER = "hf"
FORMAT = 1

# Text and vocabularies, never weights or pickles; chat templates beyond the first stand in a folder of their own.
_COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
_NOT_COPIED = ("*.index.json",)


@dataclass(frozen=True)
class ModelInfo:
    """What ``model.json`` holds.

    Args:
        dtype: of the imported tensors, in config.json's spelling.
        tokenizer_digest: SHA-256 of ``tokenizer.json``, else of the ``.model`` file, else None.
        base_digest: one digest over the imported safetensors files: the name of the immutable base.
        source: where the model came from, as the user gave it.
    """

    shape: ModelShape
    dtype: str
    tokenizer_digest: str | None
    base_digest: str
    source: str


def read_model_info(checkpoint_dir: str | Path) -> ModelInfo:
    """Raises CheckpointError when ``model.json`` is missing, of another format or incomplete."""
    path = Path(checkpoint_dir) / MODEL_FILE
    try:
        value = read_json(path)
        if value.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        shape = ModelShape.from_json(value["shape"])
        problem = type_problem(value, ModelInfo)
        if problem is not None:
            raise ValueError(problem)
        return ModelInfo(**{**value, "shape": shape})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise CheckpointError("checkpoint", str(path), f"cannot be read ({error}); import the model again") from error


def write_model_info(checkpoint_dir: str | Path, info: ModelInfo) -> None:
    """Writes ``model.json``."""
    write_json(Path(checkpoint_dir) / MODEL_FILE, {"format": FORMAT, **asdict(info)})


def side_files(hf_dir: str | Path) -> list[str]:
    """Relative names of an HF folder's files that are neither weights nor code: configs, tokenizer, templates."""
    folder = Path(hf_dir)
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(str(p.relative_to(folder)) for p in found if not any(p.match(pattern) for pattern in _NOT_COPIED))


def copy_side_files(source: str | Path, target: str | Path, leave: tuple[str, ...] = ()) -> list[str]:
    """Copies ``side_files`` byte for byte, except those named in ``leave``; returns the names."""
    names = [name for name in side_files(source) if name not in leave]
    for name in names:
        destination = Path(target) / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source) / name, destination)
    return names


def copy_model_files(source_checkpoint: str | Path, target: str | Path) -> None:
    """Copies ``model.json`` and ``hf/`` from one checkpoint folder to another that is being built."""
    shutil.copyfile(Path(source_checkpoint) / MODEL_FILE, Path(target) / MODEL_FILE)
    copy_side_files(Path(source_checkpoint) / HF_FOLDER, Path(target) / HF_FOLDER)


def tokenizer_digest(hf_dir: str | Path) -> str | None:
    """SHA-256 of ``tokenizer.json`` or, missing, of the first ``*.model``; None when the folder has no tokenizer."""
    folder = Path(hf_dir)
    candidates = [folder / "tokenizer.json", *sorted(folder.glob("*.model"))]
    return next((file_digest(path) for path in candidates if path.is_file()), None)

"""What ``transformers`` computes of a model, kept with its import: the values that a run compares its own with at its start.

``parity.safetensors`` holds texts, the log-probability of each of their tokens, and of the hidden states after each stage of
the model (the embedding, every layer, the final norm) a few dozen numbers a token, so that the layer can be named that is not
computed as it should be. It is part of the import's seal, and no checkpoint of a run carries it: weights move.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.convert import base_digest
from cpt_mega.hf.digests import BackgroundDigests
from cpt_mega.hf.model_info import HF_FOLDER, ModelInfo, read_model_info
from cpt_mega.hf.source import open_source
from cpt_mega.json_types import type_problem
from cpt_mega.lineage import library_versions, parse_json, put_into_sealed_folder, sealed_files

PARITY_FILE = "parity.safetensors"
FORMAT = 1
NUMBERS = 32  # kept of each hidden state: its product with so many random directions
_CONFIG = "config.json"
_HEADER = "reference"


@dataclass(frozen=True)
class Header:
    """Where reference values come from.

    Args:
        base_digest: of the safetensors files that were loaded, as the import records it.
        precision: that they were computed in.
        attention: transformers' name of the implementation.
        versions: of libraries.
    """

    base_digest: str
    precision: str
    attention: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """Reference values of a model of ``layers`` layers.

    Attributes:
        texts: token ids of each, int64 [n], n > 1.
        logprobs: float64 [targets], nats: of every token but the first of each text, those of all texts one behind the other.
        projection: float32 [hidden, NUMBERS].
        hidden: float32 [layers + 2, targets, NUMBERS]: of the tokens before each target, after each stage, projected.
    """

    header: Header
    texts: tuple[np.ndarray, ...]
    logprobs: np.ndarray
    projection: np.ndarray
    hidden: np.ndarray

    @cached_property
    def targets(self) -> np.ndarray:
        """The tokens that are predicted, int64 [targets]."""
        return np.concatenate([text[1:] for text in self.texts])


def make_reference(
    folder: str | Path, hf_dir: str | Path, texts: Sequence[np.ndarray], attention: str = "eager"
) -> Reference:
    """Runs texts through the model as ``transformers`` has it, in fp32 on the CPU.

    Args:
        folder: the import.
        hf_dir: the very folder that it was made from: weights that went through an export prove less.
        texts: token ids, int64 [n], n > 1.
        attention: eager or sdpa.

    Raises InputError for an HF folder that cannot be read, or holds other files than were imported.
    """
    info = read_model_info(folder)
    _check_origin(Path(folder), Path(hf_dir), info)
    projection = _directions(info.shape.hidden_size)
    logprobs, hidden = _run(Path(hf_dir), texts, projection, attention)
    header = Header(info.base_digest, "fp32", attention, library_versions(("transformers", "torch")))
    return Reference(header, tuple(texts), logprobs, projection, hidden)


def write_reference(folder: str | Path, reference: Reference) -> Path:
    """Adds the values to an import and its seal, in place of others; returns their file.

    Raises CheckpointError when the folder is not sealed, InputError when it cannot be written.
    """
    tensors = {
        "tokens": np.concatenate(reference.texts),
        "lengths": np.array([len(text) for text in reference.texts], np.int64),
        "logprobs": reference.logprobs,
        "projection": reference.projection,
        "hidden": reference.hidden,
    }
    # One entry: safetensors writes several in an order of its own each time, and the same values are to be the same bytes.
    header = {_HEADER: json.dumps({"format": FORMAT, **asdict(reference.header)})}
    try:
        put_into_sealed_folder(folder, PARITY_FILE, lambda path: save_file(tensors, path, header))
    except (OSError, SafetensorError) as error:
        raise InputError("checkpoint", str(folder), f"reference values cannot be written there ({error})") from error
    return Path(folder) / PARITY_FILE


def read_reference(folder: str | Path, info: ModelInfo) -> Reference | None:
    """The values that an import has of its own weights; None where it has none in its seal.

    Raises CheckpointError for those of other weights, of another format, or that cannot be read.
    """
    if PARITY_FILE not in sealed_files(folder):
        return None
    path = Path(folder) / PARITY_FILE
    try:
        reference = _read(path, info)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unusable(path, f"cannot be read ({error})") from error
    if reference.header.base_digest != info.base_digest:
        raise _unusable(path, f"holds values of other weights ({reference.header.base_digest[:12]})")
    return reference


def remake_command(folder: str | Path) -> str:
    """What makes reference values."""
    return f"python tools/check_parity.py {folder}"


def _unusable(path: Path, problem: str) -> CheckpointError:
    fix = f"{problem}; make them again with {remake_command(path.parent)}"
    return CheckpointError("reference values", str(path), fix)


def _read(path: Path, info: ModelInfo) -> Reference:
    """Raises what the libraries do, and ValueError for what does not fit together."""
    with safe_open(path, framework="numpy") as file:
        header = dict(parse_json((file.metadata() or {}).get(_HEADER, "{}")))
        written = header.pop("format", None)
        if written != FORMAT:
            raise ValueError(f"its format is {written!r:.20}, this version reads {FORMAT}")
        tensors = {name: file.get_tensor(name) for name in ("tokens", "lengths", "logprobs", "projection", "hidden")}
    problem = type_problem(header, Header) or _problem(tensors, info)
    if problem is not None:
        raise ValueError(problem)
    texts = np.split(tensors["tokens"], np.cumsum(tensors["lengths"])[:-1])
    kept = {name: tensors[name] for name in ("logprobs", "projection", "hidden")}
    return Reference(Header(**header), tuple(texts), **kept)


def _problem(tensors: dict[str, np.ndarray], info: ModelInfo) -> str | None:
    tokens, lengths, shape = tensors["tokens"], tensors["lengths"], info.shape
    for name in ("tokens", "lengths"):
        if tensors[name].dtype != np.int64 or tensors[name].ndim != 1 or not len(tensors[name]):
            return f"{name} are no list of whole numbers"
    if lengths.min() < 2 or lengths.max() > shape.max_positions or lengths.sum() != len(tokens):
        return "lengths of texts do not fit"
    if tokens.min() < 0 or tokens.max() >= shape.vocab_size:
        return f"a token id is outside the model's vocabulary of {shape.vocab_size}"
    targets = len(tokens) - len(lengths)
    expected = {
        "logprobs": ((targets,), np.float64),
        "projection": ((shape.hidden_size, NUMBERS), np.float32),
        "hidden": ((shape.layers + 2, targets, NUMBERS), np.float32),
    }
    for name, (size, dtype) in expected.items():
        found = tensors[name]
        if found.shape != size or found.dtype != dtype or not np.isfinite(found).all():
            return f"{name} must be finite {np.dtype(dtype).name} numbers {list(size)}"
    return None


def _check_origin(folder: Path, hf_dir: Path, info: ModelInfo) -> None:
    """Raises InputError unless an HF folder is the one that was imported, by its weights and its configuration."""
    source = open_source(hf_dir)
    with BackgroundDigests() as digests:
        for file in source.files:
            digests.add(file)
        if base_digest(source.files, digests) != info.base_digest:
            fix = (
                f"does not hold the very weight files that {folder} was made from; name that folder, or import this one"
            )
            raise InputError("--hf", str(hf_dir), fix)
    if (hf_dir / _CONFIG).read_bytes() != (folder / HF_FOLDER / _CONFIG).read_bytes():
        fix = f"has another {_CONFIG} than when {folder} was made from it; import it again"
        raise InputError("--hf", str(hf_dir), fix)


def _directions(hidden_size: int) -> np.ndarray:
    """Random directions that keep lengths on average (Johnson and Lindenstrauss); they are written beside what they gave."""
    draw = np.random.default_rng(0).standard_normal((hidden_size, NUMBERS))
    return (draw / np.sqrt(NUMBERS)).astype(np.float32)


def _run(
    hf_dir: Path, texts: Sequence[np.ndarray], projection: np.ndarray, attention: str
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and projected hidden states of all texts, as Reference has them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": attention, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(hf_dir, **options).eval()
    directions, seen = torch.from_numpy(projection), {}

    def keep(stage: int, module: torch.nn.Module, inputs: tuple, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen[stage] = hidden[0, :-1].float() @ directions

    body = model.base_model
    stages = [body.embed_tokens, *body.layers, body.norm]
    handles = [s.register_forward_hook(lambda *a, stage=n: keep(stage, *a)) for n, s in enumerate(stages)]
    logprobs, hidden = [], []
    for text in texts:
        ids = torch.from_numpy(text)
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, :-1]
        logprobs.append(logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy())
        hidden.append(torch.stack([seen[stage] for stage in range(len(stages))]).numpy())
    for handle in handles:
        handle.remove()
    return np.concatenate(logprobs), np.concatenate(hidden, axis=1)

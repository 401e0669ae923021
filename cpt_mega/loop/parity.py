"""Making the reference values of an import: which texts, from which folder. The comparison is ``identity``'s."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cpt_mega.checkpoint.trainer_state import has_state
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import HF_FOLDER, ModelInfo, read_model_info
from cpt_mega.hf.reference import make_reference, write_reference
from cpt_mega.lineage import parse_json

MOST_TOKENS = 192  # of a text that comes with this module
_DRAWN_TOKENS = (64, 128)

# Prose, source code, figures, and other scripts: what a tokenizer and a model meet.
TEXTS = (
    "The harbour lies open to the north, and in winter the wind comes straight across the water. Boats that are not "
    "taken up by the end of October are seldom there in spring. Old people in the town count the winters by what was "
    "lost in them: the year of the two ferries, the year of the lighthouse, the year in which the church bell was "
    "carried off with its tower and rang once, as they say, when it reached the bottom.",
    "def moving_average(values, width):\n"
    '    """Means of all windows of a width, oldest first."""\n'
    "    if not 0 < width <= len(values):\n"
    '        raise ValueError(f"width must be between 1 and {len(values)}")\n'
    "    total = sum(values[:width])\n    means = [total / width]\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n        means.append(total / width)\n"
    "    return means\n",
    "In 1905 the river stood at 7.42 m, in 1954 at 8.31 m and in 2013 at 8.07 m. Die Brücke wurde danach um 60 cm "
    "angehoben. Les travaux ont coûté 1 250 000 euros. Вода ушла только через две недели. 洪水之后，城里的人"
    "重新修建了堤坝。",
)


@dataclass(frozen=True)
class ParityReport:
    """What was made.

    Args:
        texts, tokens: how many; a log-probability for each token but the first of a text.
        mean_logprob: of those tokens, nats.
        path, bytes: the file.
    """

    checkpoint: str
    source: str
    texts: int
    tokens: int
    layers: int
    mean_logprob: float
    precision: str
    attention: str
    versions: dict[str, str]
    base_digest: str
    path: str
    bytes: int

    def to_json(self) -> dict:
        return asdict(self)


def make_parity(
    checkpoint: str, hf_dir: str | None = None, texts: str | None = None, attention: str = "eager"
) -> ParityReport:
    """Has ``transformers`` compute reference values and keeps them with an import.

    Args:
        hf_dir: where the model was imported from; None: where the import says.
        texts: JSONL of ``{"text": ...}`` or ``{"ids": [...]}``; None: some that come with this module.

    Raises InputError for a folder that is no import, is not what was imported, or cannot be written to, and for texts that
    the model cannot read.
    """
    folder = locate_checkpoint(checkpoint, "IMPORT")
    if has_state(folder):
        fix = "is a checkpoint of a run, whose weights have moved; name the import"
        raise CheckpointError("IMPORT", str(folder), fix)
    info = read_model_info(folder)
    source = _source(hf_dir, folder, info)
    chosen = fixed_texts(folder, info) if texts is None else _read_texts(Path(texts), folder, info)
    reference = make_reference(folder, source, chosen, attention)
    path = write_reference(folder, reference)
    header = reference.header
    return ParityReport(
        checkpoint=str(folder),
        source=str(source),
        texts=len(chosen),
        tokens=len(reference.logprobs),
        layers=info.shape.layers,
        mean_logprob=float(reference.logprobs.mean()),
        precision=header.precision,
        attention=header.attention,
        versions=header.versions,
        base_digest=header.base_digest,
        path=str(path),
        bytes=path.stat().st_size,
    )


def _source(hf_dir: str | None, folder: Path, info: ModelInfo) -> Path:
    if hf_dir is not None:
        return Path(hf_dir)
    if not (Path(info.source) / "config.json").is_file():
        fix = f"{folder} was imported from {info.source}, which is not there from here; name that folder with --hf"
        raise InputError("--hf", "not given", fix)
    return Path(info.source)


def fixed_texts(folder: Path, info: ModelInfo) -> list[np.ndarray]:
    """Token ids of the same texts each time: prose where there is a tokenizer, and ids drawn from all over the vocabulary, so
    that every part of a divided embedding is asked for."""
    draw = np.random.default_rng(0)
    found = [draw.integers(0, info.shape.vocab_size, tokens) for tokens in _DRAWN_TOKENS]
    if info.tokenizer_digest is not None:
        found += _encoded(TEXTS, folder)
    return [text[: min(MOST_TOKENS, info.shape.max_positions)] for text in found if len(text) > 1]


def _encoded(texts: Sequence[str], folder: Path) -> list[np.ndarray]:
    return [np.array(ids, np.int64) for ids in TextTokenizer.load(folder / HF_FOLDER).encode_batch(texts)]


def _read_texts(path: Path, folder: Path, info: ModelInfo) -> list[np.ndarray]:
    """Raises InputError for a file that cannot be read or a text that the model cannot: it names the line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("--texts", str(path), f"cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_text(line, f"{path}:{number}", folder, info))
    if not found:
        raise InputError("--texts", str(path), "holds no text")
    return found


def _text(line: str, where: str, folder: Path, info: ModelInfo) -> np.ndarray:
    try:
        value = parse_json(line)
        ids, text = value.get("ids"), value.get("text")
    except (ValueError, AttributeError) as error:
        raise InputError(where, line[:80], 'a text is {"text": "..."} or {"ids": [...]}') from error
    if isinstance(text, str):
        ids = _encoded([text], folder)[0].tolist()
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(token) is int for token in ids):
        raise InputError(where, line[:80], 'a text is {"text": "..."} or {"ids": [...]}, of two tokens or more')
    if min(ids) < 0 or max(ids) >= info.shape.vocab_size:
        raise InputError(where, line[:80], f"a token is outside the model's vocabulary of {info.shape.vocab_size}")
    if len(ids) > info.shape.max_positions:
        raise InputError(where, f"{len(ids)} tokens", f"the model has {info.shape.max_positions} positions; cut it")
    return np.array(ids, np.int64)

"""Scoring a file of packed rows at any layout: read, deal to the data-parallel ranks, gather, write in order."""

import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.progress import Progress

from cpt_mega.checkpoint.store import checkpoint_problem
from cpt_mega.checkpoint.trainer_state import STATE_FILE, read_state
from cpt_mega.config import Config
from cpt_mega.config.load import build_config
from cpt_mega.engine.fast_paths import apply_environment
from cpt_mega.engine.mesh import Mesh, start_mesh, stop_mesh, world_size
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.score import RowScores, score_rows
from cpt_mega.engine.state import load_weights
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError, ExitCode, InputError
from cpt_mega.hf.convert import import_hf
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.shape import ModelShape

_CHUNK_ROWS = 64  # held in memory at a time
_SECTIONS = ("parallel.", "precision")


@dataclass(frozen=True)
class ScoreRow:
    """A row of the input, padded to the length that is computed; fields as ``cpt_mega.data.rows.PackedRow`` has them."""

    id: object
    tokens: int
    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    doc_lengths: list[int]


def score_file(checkpoint: str, source: str, target: str, overrides: Sequence[str] = ()) -> int:
    """Scores ``source`` into ``target``; every rank calls it. The file appears whole or not at all.

    Raises InputError for a bad row (file and line), a layout that does not fit, or a checkpoint that cannot be read.
    """
    with scoring_engine(checkpoint, overrides) as (engine, _):
        _score_all(engine, engine.mesh, Path(source), Path(target))
    return ExitCode.FINISHED


@contextmanager
def scoring_engine(checkpoint: str, overrides: Sequence[str] = ()) -> Iterator[tuple[Engine, Path]]:
    """One model that trains nothing, and the folder of its checkpoint; see ``Scorer``."""
    with scorer(overrides) as opened:
        yield opened.engine(checkpoint)


@contextmanager
def scorer(overrides: Sequence[str] = ()) -> Iterator["Scorer"]:
    """Processes at a layout, ``parallel.*`` of ``overrides``, for models that train nothing; every rank calls it.

    Raises InputError for a layout that does not fit.
    """
    config = _scoring_config(overrides)
    apply_environment(config.parallel, config.train.deterministic)
    mesh = start_mesh(config.parallel, config.train.seed)
    try:
        with ExitStack() as stack:
            yield Scorer(config, mesh, stack, any(word.startswith("precision=") for word in overrides))
    finally:
        stop_mesh()


@dataclass(frozen=True)
class Scorer:
    """Opens models, one after another: groups of processes cannot be started twice at one address.

    Attributes:
        has_precision: whether the one of ``config`` was asked for; otherwise each model has its own.
    """

    config: Config
    mesh: Mesh
    stack: ExitStack
    has_precision: bool

    def engine(self, checkpoint: str) -> tuple[Engine, Path]:
        """A model, and the folder of its checkpoint: of a run, an iter_* folder, an import or an HF folder. A collective.

        Raises InputError for a layout that does not fit, or a checkpoint that cannot be read.
        """
        folder = Path(checkpoint)
        if (folder / "config.json").is_file():
            folder = _imported(folder, self.mesh, self.stack)
        folder = locate_checkpoint(folder, "--checkpoint")
        problem = checkpoint_problem(folder, self.mesh)
        if problem:
            raise CheckpointError("--checkpoint", str(folder), problem)
        info, config = read_model_info(folder), self.config
        if not self.has_precision:
            config = config.model_copy(update={"precision": _own_precision(folder, info.dtype)})
        check_layout(config, info.shape, world_size())
        engine = Engine(config, info.shape, self.mesh, train=False)
        load_weights(engine, folder)
        return engine, folder


def _imported(hf_folder: Path, mesh: Mesh, stack: ExitStack) -> Path:
    """An HF folder as a temporary checkpoint, made once on each host."""
    path = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="cpt_mega_score_"))
        path = Path(parent) / "import"
        import_hf(hf_folder, path)
    host = socket.gethostname()
    made = mesh.gather((host, path))
    paths = mesh.share({h: p for h, p in made if p} if made else None)
    return paths[host]


def _scoring_config(overrides: Sequence[str]) -> Config:
    """Layout and precision as asked."""
    for word in overrides:
        if not word.startswith(_SECTIONS):
            raise InputError("command line", word, "the scorer takes parallel.* and precision")
    values = {
        "run": {"dir": "."},
        "model": {"checkpoint": "."},
        "train": {
            "tokens": 0,
            "global_batch_size": world_size(),
            "seq_length": 1,  # rows bring their own length
        },
    }
    return build_config(values, overrides)


def _own_precision(folder: Path, dtype: str) -> str:
    """The precision a run trained in, or what suits an import's dtype."""
    if (folder / STATE_FILE).is_file():
        return read_state(folder).config["precision"]
    return "fp32" if dtype == "float32" else "bf16"


def _score_all(engine: Engine, mesh: Mesh, source: Path, target: Path) -> None:
    multiple = math.lcm(mesh.tp, 8)
    total = _count_lines(source)
    building = target.with_name(f".{target.name}.building")
    try:
        with (
            Progress(disable=not mesh.is_main or total < 2 * _CHUNK_ROWS) as progress,
            open(building if mesh.is_main else os.devnull, "w") as output,
        ):
            task = progress.add_task("scoring", total=total)
            for chunk in _chunks(_read_rows(source, multiple, engine.shape)):
                for line in _score_chunk(engine, mesh, chunk):
                    output.write(line + "\n")
                progress.advance(task, len(chunk))
        if mesh.is_main:
            os.replace(building, target)
    except OSError as error:
        raise InputError("--output", str(target), f"cannot be written ({error.strerror})") from error
    finally:
        if mesh.is_main:
            building.unlink(missing_ok=True)


def _score_chunk(engine: Engine, mesh: Mesh, chunk: list[ScoreRow]) -> list[str]:
    """JSON lines of a chunk, in order, on the main process; an empty list elsewhere. A collective."""
    mine = sorted(range(mesh.dp_rank, len(chunk), mesh.dp), key=lambda i: (len(chunk[i].ids), i))
    found: dict[int, str] = {}
    for _, same_length in groupby(mine, key=lambda i: len(chunk[i].ids)):
        places = list(same_length)
        scores = score_rows(engine, [chunk[i] for i in places])
        if scores and mesh.groups.tp.rank() == 0:
            found.update((i, _json_line(chunk[i], row)) for i, row in zip(places, scores, strict=True))
    parts = mesh.gather(found)
    merged = {i: line for part in parts or () for i, line in part.items()}
    return [merged[i] for i in sorted(merged)]


def _json_line(row: ScoreRow, scores: RowScores) -> str:
    n = row.tokens
    logprobs: list = [None, *scores.logprobs[: n - 1].tolist()]
    start = 0
    for length in row.doc_lengths:
        if start < n:
            logprobs[start] = None
        start += length
    ids, values = scores.top_ids[:n].tolist(), scores.top_logprobs[:n].tolist()
    top = [[[i, v] for i, v in zip(*position, strict=True)] for position in zip(ids, values, strict=True)]
    return json.dumps({"id": row.id, "logprobs": logprobs, "top": top})


def _chunks(rows: Iterator[ScoreRow]) -> Iterator[list[ScoreRow]]:
    chunk: list[ScoreRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _count_lines(source: Path) -> int:
    try:
        with open(source, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    except OSError as error:
        raise InputError("--input", str(source), f"cannot be read ({error.strerror})") from error


def _read_rows(source: Path, multiple: int, shape: ModelShape) -> Iterator[ScoreRow]:
    with open(source, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parse_row(line, f"{source}:{number}", multiple, shape)


def _parse_row(line: str, where: str, multiple: int, shape: ModelShape) -> ScoreRow:
    try:
        value = json.loads(line)
        ids = value["ids"]
        lengths = value.get("doc_lengths") or [len(ids)]
        whole = [type(x) is int for x in (*ids, *lengths)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(where, line.strip()[:80], 'a row is {"id", "ids": [...], "doc_lengths": [...]}') from error
    if not ids or not all(whole) or min(lengths) < 1:
        raise InputError(
            where, line.strip()[:80], "ids and doc_lengths hold whole numbers; no row and no document is empty"
        )
    if sum(lengths) != len(ids):
        raise InputError(f"{where} doc_lengths", lengths, f"must sum to the {len(ids)} ids of the row")
    if min(ids) < 0 or max(ids) >= shape.vocab_size:
        raise InputError(f"{where} ids", max(ids), f"outside the model's vocabulary of {shape.vocab_size}")
    if max(lengths) > shape.max_positions:
        fix = f"the model has {shape.max_positions} positions; no document may be longer"
        raise InputError(f"{where} doc_lengths", max(lengths), fix)
    return _padded(value.get("id"), ids, lengths, multiple)


def _padded(name: object, ids: list[int], lengths: list[int], multiple: int) -> ScoreRow:
    """Pads with one more document, to a length that tensor parallelism divides and that many rows share."""
    count = len(ids)
    missing = -count % multiple
    padded = np.array(ids + [0] * missing, dtype=np.int64)
    labels = np.append(padded[1:], 0)
    mask = np.zeros(len(padded), dtype=np.float32)  # scores are taken from logits; no loss is computed
    return ScoreRow(name, count, padded, labels, mask, [*lengths, missing] if missing else list(lengths))

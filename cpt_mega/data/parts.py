"""``PREFIX.parts``: what is there of a corpus that is being made.

Each unit of the inputs becomes a **part**: tokens, document lengths, rejects, and at last a report. A part with a report is
complete, whoever was killed when. The parts' tokens are appended in order to one file, which in the end becomes
``PREFIX.bin``; a part's own token file is removed after that, so that a corpus needs its own size on disk and little more.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from cpt_mega.data.appending import AppendedFile
from cpt_mega.data.encode import EncodedBatch
from cpt_mega.data.indexed import (
    BLOCK_TOKENS,
    PartDigest,
    corpus_files,
    documents_path,
    mask_path,
    parts_path,
    plans_path,
    shards_path,
)
from cpt_mega.data.indexed_writer import check_lengths, install_corpus, write_index
from cpt_mega.data.manifest import CorpusManifest, manifest_path
from cpt_mega.data.rejects import Reject, RejectCounts, reject_line, rejects_path
from cpt_mega.errors import InputError
from cpt_mega.lineage import text_digest, write_json

LOCK, RECIPE = "lock", "recipe.json"
SPARE = "spare"
TOKENS, MASK, LENGTHS, DOCUMENTS, REJECTS = "tokens", "mask", "lengths", "documents", "rejects"


@dataclass(frozen=True)
class PartReport:
    """What a part holds.

    Attributes:
        documents, tokens, text_bytes: counts.
        counted: tokens that count for the loss as targets.
        rejects: documents that were left out.
        lines: of the input, blank ones included.
        sha256: see ``PartDigest``.
        source_sha256: of the bytes of the input.
        sizes: bytes of each of its files, by kind.
    """

    documents: int
    tokens: int
    text_bytes: int
    counted: int
    rejects: int
    lines: int
    sha256: str
    source_sha256: str
    sizes: dict[str, int]


class PartFolder:
    """The folder, for one process that joins parts and any number that write them.

    Args:
        prefix: of the corpus.
        recipe: everything that decides what comes out; parts of another recipe are removed.
        dtype: of tokens.
        with_mask, with_documents: whether parts have a loss mask, and a line about every document.
    """

    def __init__(self, prefix: str, recipe: object, dtype: np.dtype, with_mask: bool, with_documents: bool):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.path = parts_path(prefix)
        self.joined_widths = {TOKENS: self.dtype.itemsize} | ({MASK: 1} if with_mask else {})  # bytes of a token
        self.with_documents = with_documents
        self._recipe = text_digest(json.dumps(recipe, sort_keys=True))

    @property
    def is_begun(self) -> bool:
        """Whether parts of this very recipe lie there."""
        return self._recipe_there() == self._recipe

    def __enter__(self) -> "PartFolder":
        """Raises InputError when another process is making this corpus, or the folder is not one of these."""
        self.path.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in self.path.iterdir()]
        others = [name for name in others if name != LOCK and not name.startswith(f".{RECIPE}.")]  # begun and killed
        if others and RECIPE not in others:
            fix = "this folder would be emptied, and holds what is not of a corpus; move it away or give another prefix"
            raise InputError("--output", str(self.path), fix)
        self._lock = open(self.path / LOCK, "w")  # noqa: SIM115  held until the end
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InputError("--output", self.prefix, "another process is making this corpus; wait for it") from error
        except OSError:
            pass  # a file system without locks
        if not self.is_begun:
            self._empty()
            write_json(self.path / RECIPE, self._recipe)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def report(self, part: int) -> PartReport | None:
        """Of a complete part; None when it is still to do."""
        try:
            return PartReport(**json.loads(self._file(part, "json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @contextlib.contextmanager
    def write(self, part: int) -> Iterator["PartWriter"]:
        """A writer of a part; ``finish`` completes it, and what is not finished does not count."""
        with contextlib.ExitStack() as stack:
            kinds = [LENGTHS, REJECTS, *([DOCUMENTS] if self.with_documents else [])]
            streams = {kind: stack.enter_context(open(self._file(part, kind), "wb")) for kind in kinds}
            for kind in self.joined_widths:
                streams[kind] = stack.enter_context(self._open_spare(part, kind))
            yield PartWriter(streams, self._file(part, "json"))

    def lengths(self, part: int) -> Iterator[np.ndarray]:
        """Tokens of each document of a part, int32, in blocks: a part may be a whole compressed file."""
        with open(self._file(part, LENGTHS), "rb") as stream:
            while len(block := np.fromfile(stream, "<i4", BLOCK_TOKENS)):
                yield block

    def rejects(self, part: int) -> Iterator[Reject]:
        """Those of a part, in order; lines as the unit counts them."""
        with open(self._file(part, REJECTS), "rb") as stream:
            for line in stream:
                yield Reject(**orjson.loads(line))

    def joined_file(self, kind: str) -> Path:
        """The file that the parts' tokens, masks and so on are appended to."""
        return self.path / f"all.{kind}"

    def _file(self, part: int, kind: str) -> Path:
        return self.path / f"{part:06d}.{kind}"

    def _recipe_there(self) -> str | None:
        try:
            return json.loads((self.path / RECIPE).read_text())
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Removes the folder; killed in the middle, what is left is still known as ours."""
        self._empty()
        shutil.rmtree(self.path)

    def _empty(self) -> None:
        # the recipe last: without one the folder would not be known as ours
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == RECIPE):
            if path.name != LOCK:
                path.unlink()

    def forget_unless_whole(self, part: int) -> None:
        """Makes a part one that is still to do when its files do not hold what its report says."""
        report = self.report(part)
        if report is None:
            return
        if not self._is_whole(part, report, report.sizes):
            self._file(part, "json").unlink()

    def is_joined(self, part: int, report: PartReport) -> bool:
        """Whether the part's tokens have been appended, and the rest of it is there."""
        rest = report.sizes.keys() - self.joined_widths.keys()
        return not self._file(part, TOKENS).exists() and self._is_whole(part, report, rest)

    def _is_whole(self, part: int, report: PartReport, kinds: Iterable[str]) -> bool:
        files = {kind: self._file(part, kind) for kind in kinds}
        return all(path.exists() and path.stat().st_size == report.sizes[kind] for kind, path in files.items())

    def append(self, part: int, kind: str, target: AppendedFile) -> None:
        """Appends a part's file of a kind."""
        target.append(self._file(part, kind))

    def release(self, part: int) -> None:
        """Frees the files of what has been appended; the tokens last, as they say that all was."""
        for kind in reversed(self.joined_widths):
            os.replace(self._file(part, kind), self.path / f"{SPARE}.{part:06d}.{kind}")

    def _open_spare(self, part: int, kind: str) -> BinaryIO:
        """A file to write a part's tokens or mask to: an older part's, whose memory and blocks are at hand, or a new one.

        ``finish`` cuts off what is left of the older one.
        """
        for spare in self.path.glob(f"{SPARE}.*.{kind}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.rename(spare, self._file(part, kind))
                return open(self._file(part, kind), "r+b")
        return open(self._file(part, kind), "wb")


class PartWriter:
    """Writes one part, batch by batch."""

    def __init__(self, streams: dict, report: Path):
        self._streams, self._report = streams, report
        self._digest = PartDigest()
        self._counts = dict.fromkeys(("documents", "tokens", "text_bytes", "counted", "rejects", "lines"), 0)

    def add(self, batch: EncodedBatch) -> None:
        """Appends a batch. Raises InputError for a document that the format cannot hold."""
        check_lengths(batch.lengths)
        lengths = batch.lengths.astype("<i4")
        self._streams[TOKENS].write(batch.tokens.data)
        self._streams[LENGTHS].write(lengths.data)
        if MASK in self._streams:
            self._streams[MASK].write(batch.mask.data)
        if DOCUMENTS in self._streams:
            paths = (orjson.dumps({"path": document.path}, option=orjson.OPT_APPEND_NEWLINE) for document in batch.kept)
            self._streams[DOCUMENTS].writelines(paths)
        self._streams[REJECTS].writelines(map(reject_line, batch.rejects))
        self._digest.add(batch.tokens, batch.mask)
        self._digest.add_lengths(lengths)
        counted = batch.tokens.size if batch.mask is None else int(batch.mask.sum())
        found = (len(lengths), batch.tokens.size, batch.text_bytes, counted, len(batch.rejects), batch.lines)
        for name, count in zip(self._counts, found, strict=True):
            self._counts[name] += count

    def finish(self, source_sha256: str) -> PartReport:
        """Completes the part: its report is written last."""
        for stream in self._streams.values():
            stream.truncate()
            stream.flush()
        sizes = {kind: stream.tell() for kind, stream in self._streams.items()}
        report = PartReport(**self._counts, sha256=self._digest.hexdigest(), source_sha256=source_sha256, sizes=sizes)
        # Not forced to the disk: a report that outlives its files in a power cut is found out by their sizes.
        unfinished = self._report.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(report)))
        os.replace(unfinished, self._report)
        return report


class Joiner:
    """Appends complete parts in order, and makes the corpus of them.

    ``reports`` are those of the parts that are appended.

    Args:
        folder: opened.
        parts: how many there are to be.
    """

    def __init__(self, folder: PartFolder, parts: int):
        self.folder, self.parts = folder, parts
        self.reports: list[PartReport] = []
        self._joined: dict[str, AppendedFile] = {}
        self._recover()

    def __enter__(self) -> "Joiner":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._joined.values():
            file.close()

    def to_do(self) -> list[int]:
        """Parts that are not complete."""
        later = range(len(self.reports), self.parts)
        return [part for part in later if self.folder.report(part) is None]

    def join_ready(self) -> None:
        """Appends every part that is complete and next."""
        while len(self.reports) < self.parts and (report := self.folder.report(len(self.reports))):
            part = len(self.reports)
            for kind, target in self._joined.items():
                self.folder.append(part, kind, target)
            self.folder.release(part)
            self.reports.append(report)

    def install(self, manifest: CorpusManifest) -> None:
        """Puts the corpus where it belongs and removes the folder; until the new one is whole the old one stands."""
        folder, prefix = self.folder, self.folder.prefix
        index = folder.path / "all.idx"
        with open(index, "wb") as stream:
            write_index(stream, folder.dtype, lambda: chain.from_iterable(map(folder.lengths, range(self.parts))))
        if folder.with_documents:
            self._join_anew(DOCUMENTS)
        for target in self._joined.values():
            target.finish()
        _to_disk(index)
        # The index first: without one there is no corpus, and nothing is taken for a part of the old one.
        corpus_files(prefix)[1].unlink(missing_ok=True)
        manifest_path(prefix).unlink(missing_ok=True)
        shards_path(prefix).unlink(missing_ok=True)
        shutil.rmtree(plans_path(prefix), ignore_errors=True)  # of the old one; new ones would not be mistaken for them
        optional = {MASK: mask_path(prefix), DOCUMENTS: documents_path(prefix), REJECTS: rejects_path(prefix)}
        for kind, target in optional.items():
            target.unlink(missing_ok=True)
            if folder.joined_file(kind).exists():
                os.replace(folder.joined_file(kind), target)
        install_corpus(prefix, folder.joined_file(TOKENS), index)
        manifest.write(prefix)
        folder.remove()

    def collect_rejects(self, lines_before: Sequence[int]) -> RejectCounts:
        """Counts the rejects of all parts and writes them to one file, if there are any.

        ``lines_before[part]`` is what the line numbers of a part lack.
        """
        counts, path = RejectCounts(), self.folder.joined_file(REJECTS)
        path.unlink(missing_ok=True)
        for part, report in enumerate(self.reports):
            if not report.rejects:
                continue
            with open(path, "ab") as stream:
                for found in self.folder.rejects(part):
                    reject = replace(found, line=found.line + lines_before[part])
                    counts.add(reject)
                    stream.write(reject_line(reject))
        return counts

    def _join_anew(self, kind: str) -> None:
        with contextlib.closing(AppendedFile(self.folder.joined_file(kind), 0)) as target:
            for part in range(self.parts):
                self.folder.append(part, kind, target)
            target.finish()

    def _recover(self) -> None:
        """Takes up what an earlier process joined, as far as it is all there; cuts off what it had not finished."""
        folder = self.folder
        reports: list[PartReport] = []
        while len(reports) < self.parts and (report := folder.report(len(reports))):
            if not folder.is_joined(len(reports), report):
                break
            reports.append(report)
        self.reports = reports[: _covered(reports, folder)]
        for part in range(len(self.reports), self.parts):
            folder.forget_unless_whole(part)
        for kind, width in folder.joined_widths.items():
            size = sum(report.tokens for report in self.reports) * width
            self._joined[kind] = AppendedFile(folder.joined_file(kind), size)


def _covered(reports: Sequence[PartReport], folder: PartFolder) -> int:
    """How many of the first reports the joined files hold the tokens of."""
    held = [_size(folder.joined_file(kind)) // width for kind, width in folder.joined_widths.items()]
    ends = np.cumsum([report.tokens for report in reports], dtype=np.int64)
    return int(np.searchsorted(ends, min(held), side="right"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _to_disk(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())

"""Text files to a corpus: ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.manifest.json``, and the rejects if any.

Every document of the input is in the corpus or among the rejects. The files appear together when all is done; until
then, on an error and on Ctrl-C, whatever stood under PREFIX stays as it was.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from cpt_mega import __version__
from cpt_mega.data.encode import EncodedChunk, encode_chunks
from cpt_mega.data.indexed import IndexedCorpus, IndexedCorpusWriter, token_dtype
from cpt_mega.data.manifest import CorpusManifest, content_digest, load_manifest, manifest_path
from cpt_mega.data.readers import Document, check_input, read_chunks
from cpt_mega.data.rejects import Reject, RejectLog
from cpt_mega.data.routes import AUTO, REFERENCE, ROUTES, choose_route
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.lineage import file_digest

SAMPLE_BYTES = 1 << 20  # of all inputs: the reference takes a third of a second for it
BOS_POLICIES = ("auto", "always", "never")


@dataclass(frozen=True)
class PreprocessOptions:
    """What to preprocess, and how.

    Attributes:
        inputs: files, in the order their documents take in the corpus.
        tokenizer: what ``TextTokenizer.load`` takes.
        output: path prefix of the corpus.
        workers: processes that encode; the result does not depend on it.
        field: the key of a record that holds the text.
        bos: ``auto`` adds BOS if the tokenizer itself does; ``always``; ``never``.
        max_reject_share: rejects over documents in, above which nothing is written.
        encoder: the route from texts to ids, a name of ``routes.ROUTES`` or ``auto``; ids do not depend on it.
        reuse: keep a corpus that stands there already if it was made of the same inputs in the same way.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output: str
    workers: int = 1
    field: str = "text"
    bos: str = "auto"
    max_reject_share: float = 0.001
    encoder: str = AUTO
    reuse: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range or an input that is not there."""
        if not self.inputs:
            raise InputError("--input", "", "give at least one file")
        for path in self.inputs:
            check_input(path)
        if self.workers < 1:
            raise InputError("--workers", self.workers, "give at least 1")
        if self.bos not in BOS_POLICIES:
            raise InputError("--bos", self.bos, f"give one of {', '.join(BOS_POLICIES)}")
        if self.encoder not in (AUTO, *ROUTES):
            raise InputError("--encoder", self.encoder, f"give one of {', '.join((AUTO, *ROUTES))}")
        if not 0 <= self.max_reject_share <= 1:
            raise InputError("--max-reject-share", self.max_reject_share, "a share lies between 0 and 1")
        if not os.path.basename(self.output) or self.output.endswith((".bin", ".idx")):
            raise InputError("--output", self.output, "give a path prefix: .bin and .idx are put behind it")


@dataclass(frozen=True)
class PreprocessReport:
    """What came out: the manifest, rejects by reason with the first few, seconds, whether it was there already; the route
    from texts to ids, and why faster ones were passed over."""

    prefix: str
    manifest: CorpusManifest
    rejects_by_reason: dict[str, int]
    first_rejects: list[Reject]
    seconds: float
    reused: bool = False
    route: str = REFERENCE
    passed_over: tuple[str, ...] = ()

    @property
    def documents_in(self) -> int:
        """Documents of the inputs: those of the corpus and the rejects."""
        return self.manifest.documents + self.manifest.rejects


def preprocess(
    options: PreprocessOptions, advance: Callable[[EncodedChunk], None] = lambda chunk: None
) -> PreprocessReport:
    """Makes a corpus; ``advance`` is called with every encoded chunk.

    Raises InputError for bad options, an unusable tokenizer, too many rejects, or inputs without any text.
    """
    begun = time.monotonic()
    tokenizer = TextTokenizer.load(options.tokenizer)
    bos = _adds_bos(tokenizer, options.bos)
    sources = [_measured(path, options.field) for path in options.inputs]
    recipe = _recipe(tokenizer, bos, sources)
    if options.reuse and (manifest := _standing(options, recipe)):
        return PreprocessReport(options.output, manifest, {}, [], time.monotonic() - begun, reused=True)
    route, passed_over = choose_route(tokenizer, options.encoder, _sample(options))
    with RejectLog(options.output) as rejects:
        with IndexedCorpusWriter(options.output, recipe["dtype"]) as writer:
            text_bytes = _write_documents(options, bos, route, writer, rejects, advance)
            _check_outcome(options, writer.documents, rejects)
            # The old manifest does not describe what is renamed into place now.
            manifest_path(options.output).unlink(missing_ok=True)
        manifest = CorpusManifest(
            **recipe,
            documents=writer.documents,
            tokens=writer.tokens,
            content_digest=writer.content_digest,
            token_bytes=text_bytes,
            rejects=rejects.count,
        )
        manifest.write(options.output)
    seconds = time.monotonic() - begun
    return PreprocessReport(
        options.output,
        manifest,
        rejects.by_reason,
        rejects.first,
        seconds,
        route=route,
        passed_over=tuple(passed_over),
    )


def _sample(options: PreprocessOptions) -> Iterator[str]:
    """Texts of the beginning of every input, on which encoders are compared."""
    for path in options.inputs:
        left = SAMPLE_BYTES // len(options.inputs)
        for chunk in islice(read_chunks(path, options.field), 1):
            for item in chunk.parse():
                if isinstance(item, Document) and left > 0:
                    yield item.text[:left]
                    left -= len(item.text)


def _adds_bos(tokenizer: TextTokenizer, policy: str) -> bool:
    if policy == "always" and tokenizer.bos_id is None:
        raise InputError("--bos", policy, "the tokenizer has no BOS token; use auto or never")
    return {"auto": tokenizer.adds_bos, "always": True, "never": False}[policy]


def _measured(path: str, field: str) -> dict:
    return {
        "path": os.path.abspath(path),
        "bytes": os.path.getsize(path),
        "sha256": file_digest(path),
        "field": field,
    }


def _recipe(tokenizer: TextTokenizer, bos: bool, sources: list[dict]) -> dict:
    """The fields of the manifest that are known before the first document: they decide what comes out."""
    return {
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id if bos else None,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "sources": sources,
        "tool_version": __version__,
    }


def _standing(options: PreprocessOptions, recipe: dict) -> CorpusManifest | None:
    """The manifest of an intact corpus under PREFIX that this very recipe made; None when there is none."""
    try:
        manifest = load_manifest(options.output)
        if manifest is None or any(getattr(manifest, name) != value for name, value in recipe.items()):
            return None
        manifest.check_against(IndexedCorpus(options.output))
    except InputError:
        return None  # damaged: made again
    accepted = manifest.rejects <= options.max_reject_share * (manifest.documents + manifest.rejects)
    return manifest if accepted and content_digest(options.output) == manifest.content_digest else None


def _write_documents(
    options: PreprocessOptions,
    bos: bool,
    route: str,
    writer: IndexedCorpusWriter,
    rejects: RejectLog,
    advance: Callable[[EncodedChunk], None],
) -> int:
    """Encodes all inputs into the writer and the log; returns the UTF-8 bytes of the text written."""
    text_bytes = 0
    chunks = chain.from_iterable(read_chunks(path, options.field) for path in options.inputs)
    for encoded in encode_chunks(chunks, options.tokenizer, bos, options.workers, route):
        writer.add_many(encoded.tokens, encoded.lengths)
        for reject in encoded.rejects:
            rejects.add(reject)
        text_bytes += encoded.text_bytes
        advance(encoded)
    return text_bytes


def _check_outcome(options: PreprocessOptions, documents: int, rejects: RejectLog) -> None:
    share = rejects.count / max(documents + rejects.count, 1)
    if share > options.max_reject_share:
        shown = "; ".join(map(str, rejects.first))
        fix = f"{rejects.count} of {documents + rejects.count} documents were rejected ({share:.2%}): {shown}"
        raise InputError("--max-reject-share", options.max_reject_share, f"{fix}. Mend them or raise the limit")
    if not documents:
        raise InputError("--input", ", ".join(options.inputs), "holds no document with text")

"""Text files to a corpus: ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.manifest.json``, and the rejects if any.

Every document of the input is in the corpus or among the rejects. The files appear together when all is done; until
then whatever stood under PREFIX stays as it was, and what has been made is in ``PREFIX.parts``: stopped or killed, the
same call goes on from there and ends with the same bytes.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cpt_mega import __version__
from cpt_mega.data.chat import ChatDocuments, template_digest
from cpt_mega.data.digests_ahead import DigestsAhead
from cpt_mega.data.encode import DocumentEncoder, TextDocuments
from cpt_mega.data.indexed import IndexedCorpus, has_corpus, token_dtype
from cpt_mega.data.manifest import (
    ALL,
    MASKS,
    CorpusManifest,
    changed_sources,
    damaged_parts,
    describe_sources,
    load_manifest,
    parts_digest,
    strip_measures,
)
from cpt_mega.data.parts import Joiner, PartFolder, PartReport
from cpt_mega.data.readers import Batch, Fields, JsonlRange, Unit
from cpt_mega.data.rejects import Reject, RejectCounts
from cpt_mega.data.routes import AUTO, REFERENCE, ROUTES, ChosenRoute, choose_route
from cpt_mega.data.shards import shard_prefix
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.data.units import Input, plan_units, shard_of, survey
from cpt_mega.data.workers import UnitEncoder, make_parts
from cpt_mega.errors import InputError
from cpt_mega.lineage import text_digest

SHOWN_FAULTS = 3
# Of the corpus, on which encoders are compared: the reference takes 0.2 s for it.
SAMPLE_BYTES, SAMPLE_UNITS = 1 << 19, 8
BOS_POLICIES = ("auto", "always", "never")
ANY_NAME = ("*",)
TEXT_FIELD, CHAT_FIELD = "text", "messages"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What to preprocess, and how.

    Attributes:
        inputs: files and folders, in the order their documents take in the corpus.
        tokenizer: what ``TextTokenizer.load`` takes.
        output: path prefix of the corpus.
        workers: processes that encode; the result does not depend on it.
        field: the key of a record that holds the text or the messages; None: ``text``, for chats ``messages``.
        chat: documents are lists of messages, which the tokenizer's chat template renders.
        loss_mask: which tokens of a chat count for the loss, one of ``manifest.MASKS``.
        include: patterns of file names that are taken from folders.
        bos: ``auto`` adds BOS if the tokenizer itself does; ``always``; ``never``.
        max_reject_share: rejects over documents in, above which no corpus is written; empty ones and binary files aside.
        encoder: the route from texts to ids, a name of ``routes.ROUTES`` or ``auto``; ids do not depend on it.
        shard: ``(index, shards)``: only this shard of the inputs, written under ``shard_prefix``.
        reuse: keep a corpus that stands there already if it was made of the same inputs in the same way, else replace it.
        overwrite: replace a corpus that stands there.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output: str
    workers: int = 1
    field: str | None = None
    chat: bool = False
    loss_mask: str = ALL
    include: tuple[str, ...] = ANY_NAME
    bos: str = "auto"
    max_reject_share: float = 0.001
    encoder: str = AUTO
    shard: tuple[int, int] | None = None
    reuse: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range."""
        if not self.inputs:
            raise InputError("--input", "", "give at least one file or folder")
        if self.workers < 1:
            raise InputError("--workers", self.workers, "give at least 1")
        choices = {"--bos": BOS_POLICIES, "--encoder": (AUTO, *ROUTES), "--loss-mask": MASKS}
        for option, known in choices.items():
            value = getattr(self, option[2:].replace("-", "_"))
            if value not in known:
                raise InputError(option, value, f"give one of {', '.join(known)}")
        if self.chat and self.encoder not in (AUTO, REFERENCE):
            raise InputError("--encoder", self.encoder, "chats go by the tokenizer's own library; use auto")
        if self.loss_mask != ALL and not self.chat:
            raise InputError("--loss-mask", self.loss_mask, "is about the messages of chats; add --chat")
        if not 0 <= self.max_reject_share <= 1:
            raise InputError("--max-reject-share", self.max_reject_share, "a share lies between 0 and 1")
        if not os.path.basename(self.output) or self.output.endswith((".bin", ".idx")):
            raise InputError("--output", self.output, "give a path prefix: .bin and .idx are put behind it")
        if self.shard and not 0 <= self.shard[0] < self.shard[1]:
            raise InputError("--shard", "/".join(map(str, self.shard)), "of N shards, I runs from 0 to N - 1")

    @property
    def fields(self) -> Fields:
        """Where a record's text stands."""
        return Fields(self.field or (CHAT_FIELD if self.chat else TEXT_FIELD), self.chat)

    @property
    def prefix(self) -> str:
        """Of what is written."""
        return shard_prefix(self.output, *self.shard) if self.shard else self.output


@dataclass(frozen=True)
class PreprocessReport:
    """What came out: the manifest, rejects by reason with the first few, seconds, whether it was there already; the route
    from texts to ids, and why faster ones were passed over; the bytes of input that an earlier call had encoded."""

    prefix: str
    manifest: CorpusManifest
    rejects_by_reason: dict[str, int]
    first_rejects: list[Reject]
    seconds: float
    reused: bool = False
    route: str = REFERENCE
    passed_over: tuple[str, ...] = ()
    taken_up_bytes: int = 0


class NoProgress:
    """Shows nothing; what ``preprocess`` tells how far it is."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Encoding begins; so much of it has been done before."""

    def advance(self, done_bytes: int, tokens: int) -> None:
        """So much since then, in all."""


def preprocess(options: PreprocessOptions, progress: NoProgress | None = None) -> PreprocessReport:
    """Makes a corpus.

    Raises InputError for bad options, an unusable tokenizer or input, too many rejects, or inputs without any text.
    """
    begun = time.monotonic()
    inputs = _survey(options)
    planned = plan_units(inputs)
    units = shard_of(planned, *options.shard) if options.shard else planned
    digest = DigestsAhead(units, options.workers - 1)
    with digest:
        tokenizer = TextTokenizer.load(options.tokenizer)
        plan = _Plan(inputs, units, _recipe(options, tokenizer, inputs, planned))
        if options.reuse and (manifest := _standing(options, plan, digest)):
            return PreprocessReport(options.prefix, manifest, {}, [], time.monotonic() - begun, reused=True)
        folder = _open_folder(options, tokenizer, plan)
        encoder, route = _open_encoder(options, tokenizer, plan)
    with folder, Joiner(folder, len(plan.units)) as joiner:
        work = UnitEncoder(encoder, options.fields, folder, plan.units, digest)
        taken_up_bytes = _encode_all(work, joiner, options.workers, progress or NoProgress())
        rejects = joiner.collect_rejects(_lines_before(plan.units, joiner.reports))
        manifest = _manifest(options, plan, joiner.reports, rejects)
        _check_outcome(options, manifest, rejects, folder)
        _check_unchanged(options, plan)
        joiner.install(manifest)
    return PreprocessReport(
        options.prefix,
        manifest,
        rejects.by_kind,
        rejects.first,
        time.monotonic() - begun,
        route=route.name,
        passed_over=tuple(route.passed_over),
        taken_up_bytes=taken_up_bytes,
    )


@dataclass(frozen=True)
class _Plan:
    """What is to be made: the inputs, the units of this run, and what decides what comes out of them.

    ``recipe`` holds the fields of the manifest that are known before the first document.
    """

    inputs: list[Input]
    units: list[Unit]
    recipe: dict


def _survey(options: PreprocessOptions) -> list[Input]:
    inputs = survey(options.inputs, options.include)
    for one in inputs:
        if one.names and os.path.commonpath([one.path, os.path.abspath(options.output)]) == one.path:
            raise InputError(
                "--output", options.output, f"lies in the input {one.path}, and would be read the next time"
            )
    if options.include != ANY_NAME and not any(map(os.path.isdir, options.inputs)):
        raise InputError("--include", " ".join(options.include), "chooses files of folders, and no input is one")
    return inputs


def _open_folder(options: PreprocessOptions, tokenizer: TextTokenizer, plan: _Plan) -> PartFolder:
    """The folder of the parts. Raises InputError when a corpus stands there that is not to be replaced."""
    stamps = [(one.path, one.stamp) for one in plan.inputs]
    everything = [plan.recipe, sorted(tokenizer.specials), stamps, vars(options.fields), options.include]
    has_mask, has_names = options.loss_mask != ALL, any(one.names for one in plan.inputs)
    folder = PartFolder(options.prefix, everything, np.dtype(plan.recipe["dtype"]), has_mask, has_names)
    if not (options.reuse or options.overwrite or folder.is_begun) and has_corpus(options.prefix):
        fix = "a corpus stands there; --overwrite replaces it, --reuse keeps it if it was made of the same"
        raise InputError("--output", options.prefix, fix)
    return folder


def _encode_all(work: UnitEncoder, joiner: Joiner, workers: int, progress: NoProgress) -> int:
    """Makes and joins the parts that are still to do; the bytes of input that had been encoded before."""
    to_do = joiner.to_do()
    total, left = (
        sum(unit.input_bytes for unit in some) for some in (work.units, [work.units[part] for part in to_do])
    )
    progress.start(total, total - left)
    for _ in make_parts(work, to_do, workers, progress.advance):
        joiner.join_ready()
    joiner.join_ready()  # what an earlier process had made
    return total - left


def _open_encoder(
    options: PreprocessOptions, tokenizer: TextTokenizer, plan: _Plan
) -> tuple[DocumentEncoder, ChosenRoute]:
    bos = plan.recipe["bos_id"] is not None
    if options.chat:
        return ChatDocuments(tokenizer, bos, options.loss_mask), choose_route(tokenizer, REFERENCE, ())
    chosen = choose_route(tokenizer, options.encoder, _sample(plan.units, options.fields))
    return TextDocuments(tokenizer, bos, chosen.route), chosen


def _sample(units: Sequence[Unit], fields: Fields) -> Iterator[str]:
    """Texts of the beginning of a few units from all over the inputs."""
    chosen = units[:: -(-len(units) // SAMPLE_UNITS)] if units else []
    for unit in chosen:
        left = SAMPLE_BYTES // len(chosen)
        for document in next(unit.read(fields), Batch()).documents:  # one line may go on through several units
            if left > 0:
                yield document.content[:left]
                left -= len(document.content)


def _recipe(
    options: PreprocessOptions, tokenizer: TextTokenizer, inputs: Sequence[Input], planned: Sequence[Unit]
) -> dict:
    if options.bos == "always" and tokenizer.bos_id is None:
        raise InputError("--bos", options.bos, "the tokenizer has no BOS token; use auto or never")
    bos = {"auto": tokenizer.adds_bos, "always": True, "never": False}[options.bos]
    shard = None
    if options.shard:
        stamps = [one.stamp for one in inputs]
        plan = text_digest("\n".join([*stamps, *map(repr, planned)]))
        shard = {"index": options.shard[0], "shards": options.shard[1], "plan": plan}
    return {
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id if bos else None,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "loss_mask": options.loss_mask,
        "chat_digest": template_digest(tokenizer) if options.chat else None,
        "tool_version": __version__,
        "shard": shard,
    }


def _manifest(
    options: PreprocessOptions, plan: _Plan, reports: list[PartReport], rejects: RejectCounts
) -> CorpusManifest:
    parts = [
        {
            "documents": report.documents,
            "tokens": report.tokens,
            "sha256": report.sha256,
            "rejects": report.rejects,
            "source": unit.source,
            "source_bytes": unit.input_bytes,
            "source_sha256": report.source_sha256,
        }
        for unit, report in zip(plan.units, reports, strict=True)
    ]
    return CorpusManifest(
        **plan.recipe,
        documents=sum(report.documents for report in reports),
        tokens=sum(report.tokens for report in reports),
        content_digest=parts_digest(parts),
        parts=parts,
        sources=describe_sources(_source_names(options, plan.inputs), parts),
        token_bytes=sum(report.text_bytes for report in reports),
        counted_tokens=sum(report.counted for report in reports),
        rejects=rejects.total,
        harmless_rejects=rejects.harmless,
    )


def _source_names(options: PreprocessOptions, inputs: list[Input]) -> list[dict]:
    """What of a source is known before it is read."""
    names = [{"path": one.path, "field": options.fields.name} for one in inputs]
    return [
        name | ({"include": list(options.include)} if os.path.isdir(one.path) else {})
        for name, one in zip(names, inputs, strict=True)
    ]


def _standing(options: PreprocessOptions, plan: _Plan, digest: DigestsAhead) -> CorpusManifest | None:
    """The manifest of an intact corpus under PREFIX that this very plan made; None when there is none."""
    try:
        manifest = load_manifest(options.prefix)
        if manifest is None or any(getattr(manifest, name) != value for name, value in plan.recipe.items()):
            return None
        corpus = IndexedCorpus(options.prefix)
        manifest.check_against(corpus)
    except InputError:
        return None  # damaged: made again
    if strip_measures(manifest.sources) != _source_names(options, plan.inputs):
        return None
    if changed_sources(manifest, plan.units, digest):
        return None
    accepted = manifest.fault_share <= options.max_reject_share
    return manifest if accepted and not damaged_parts(corpus, manifest) else None


def _check_unchanged(options: PreprocessOptions, plan: _Plan) -> None:
    """Raises InputError when an input was written to meanwhile: half of it would be old and half new."""
    for before, now in zip(plan.inputs, survey(options.inputs, options.include), strict=True):
        if before.stamp != now.stamp:
            raise InputError("--input", before.path, "changed while it was read; run again")


def _lines_before(units: Sequence[Unit], reports: Sequence[PartReport]) -> list[int]:
    """For each unit that counts its own lines from 1, the lines of its file before it; 0 for the others."""
    lines, before = {}, []
    rejecting = {unit.source for unit, report in zip(units, reports, strict=True) if report.rejects}
    for unit, report in zip(units, reports, strict=True):
        if not isinstance(unit, JsonlRange) or unit.source not in rejecting:
            before.append(0)
            continue
        if unit.source not in lines:
            lines[unit.source] = _lines_that_begin_before(unit.path, unit.start)
        before.append(lines[unit.source])
        lines[unit.source] += report.lines
    return before


def _lines_that_begin_before(path: str, place: int) -> int:
    """What a shard that begins in the middle of a file has to count."""
    if place == 0:
        return 0
    lines, left = 1, place - 1
    with open(path, "rb") as stream:
        while left and (block := stream.read(min(BLOCK_BYTES, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


def _check_outcome(
    options: PreprocessOptions, manifest: CorpusManifest, rejects: RejectCounts, folder: PartFolder
) -> None:
    share = manifest.fault_share
    if share > options.max_reject_share and not options.shard:  # of all shards together: merge_shards
        shown = "; ".join(map(str, rejects.first_faults[:SHOWN_FAULTS]))
        fix = f"{manifest.faults} of {manifest.documents_in} documents were rejected ({share:.2%}), as {shown}"
        where = f"All are in {folder.joined_file('rejects')}"
        advice = _advice(options, rejects) or "Correct them, or raise the limit and run again: nothing is encoded twice"
        raise InputError("--max-reject-share", options.max_reject_share, f"{fix}. {where}. {advice}")
    if not manifest.documents and not options.shard:
        raise InputError("--input", ", ".join(options.inputs), "holds no document with text")


def _advice(options: PreprocessOptions, rejects: RejectCounts) -> str | None:
    """What to change when nearly all rejects say that the records are others than was thought."""
    of_field = sum(count for kind, count in rejects.by_kind.items() if "field" in kind)
    if of_field > rejects.total / 2:
        kind = "text" if options.chat else "chats (--chat)"
        return f"Name the field by --field; is it {kind}?"
    if any(os.path.isdir(path) for path in options.inputs):
        return "Choose the files by --include '*.py' '*.md', or raise the limit and run again"
    return None

"""``PREFIX.manifest.json``: what a corpus was made of, by which tokenizer, and how to recognise it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.readers import Unit
from cpt_mega.errors import InputError
from cpt_mega.lineage import combined_digest, read_json, write_json

ALL, ASSISTANT = "all", "assistant"
MASKS = (ALL, ASSISTANT)  # which tokens count for the loss as targets


@dataclass(frozen=True)
class CorpusManifest:
    """The sidecar of a corpus.

    Attributes:
        tokenizer_digest: SHA-256 of ``tokenizer.json`` or of the SentencePiece model.
        vocab_size: highest token id of the tokenizer plus one.
        eos_id: the token that ends every document.
        bos_id: the token that begins every document; None when none is added.
        dtype: numpy name of the stored tokens.
        documents, tokens: counts of the corpus; tokens include BOS and EOS.
        content_digest: SHA-256 over the digests of the parts; the same however many shards hold the corpus.
        parts: documents that were digested together, in order, and the bytes of an input that they came from:
            ``{"documents", "tokens", "sha256", "rejects", "source", "source_bytes", "source_sha256"}``, where ``sha256``
            is a ``PartDigest`` and ``source`` an index into ``sources``.
        sources: one ``{"path", "bytes", "sha256", "field"}`` per input; the digest is over those of its parts. For a
            folder also ``include``, the patterns its files were chosen by.
        tool_version: of this project.
        token_bytes: UTF-8 bytes of the text, for bits per byte; None when it is not known.
        rejects: documents of the sources that are not in the corpus; with ``harmless_rejects`` of them nothing was lost.
        loss_mask: one of MASKS; all but ``all`` with a mask beside the tokens.
        chat_digest: of the chat template and the special tokens it names; None where documents were no chats.
        counted_tokens: how many count; None when it is not known.
        shard: ``{"index", "shards", "plan"}`` when this is one of several; the plan is a digest of all units of the inputs.
    """

    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    dtype: str
    documents: int
    tokens: int
    content_digest: str
    parts: list[dict]
    sources: list[dict]
    tool_version: str
    token_bytes: int | None = None
    rejects: int = 0
    harmless_rejects: int = 0
    loss_mask: str = ALL
    chat_digest: str | None = None
    counted_tokens: int | None = None
    shard: dict | None = None

    @property
    def documents_in(self) -> int:
        """Documents of the sources: those of the corpus and the rejects."""
        return self.documents + self.rejects

    @property
    def faults(self) -> int:
        """Rejects with which text was lost."""
        return self.rejects - self.harmless_rejects

    @property
    def fault_share(self) -> float:
        """Faults over documents in; 0 where there are none."""
        return self.faults / max(self.documents_in, 1)

    def write(self, prefix: str | os.PathLike) -> None:
        """Writes the sidecar of ``prefix``, whole or not at all."""
        write_json(manifest_path(prefix), asdict(self))

    def check_against(self, corpus: IndexedCorpus) -> None:
        """Raises InputError when the counts or the dtype are not those of the corpus beside it."""
        for name, found in (("documents", corpus.documents), ("tokens", corpus.tokens), ("dtype", corpus.dtype.name)):
            if getattr(self, name) != found:
                fix = f"the corpus beside it has {found}; remove a manifest of another corpus, or preprocess again"
                raise InputError(f"{manifest_path(corpus.prefix)} {name}", getattr(self, name), fix)
        if (self.loss_mask != ALL) != corpus.has_mask:
            fix = f"{mask_path(corpus.prefix)} is {'there' if corpus.has_mask else 'missing'}; preprocess again"
            raise InputError(f"{manifest_path(corpus.prefix)} loss_mask", self.loss_mask, fix)


def manifest_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.manifest.json``."""
    return Path(f"{prefix}.manifest.json")


def parts_digest(parts: list[dict]) -> str:
    """``content_digest`` of a corpus of these parts."""
    return combined_digest([part["sha256"] for part in parts])


def describe_sources(sources: list[dict], parts: list[dict]) -> list[dict]:
    """The sources with their sizes and digests, as far as the parts were made of them."""
    described = []
    for index, source in enumerate(sources):
        own = [part for part in parts if part["source"] == index]
        digest = combined_digest([part["source_sha256"] for part in own])
        described.append(source | {"bytes": sum(part["source_bytes"] for part in own), "sha256": digest})
    return described


def strip_measures(sources: list[dict]) -> list[dict]:
    """The sources without what ``describe_sources`` adds."""
    return [{key: value for key, value in source.items() if key not in ("bytes", "sha256")} for source in sources]


def changed_sources(manifest: CorpusManifest, units: Sequence[Unit]) -> list[str]:
    """Paths of sources that are not what the parts were made of; all of them when they make other units."""
    if len(units) != len(manifest.parts):
        return [source["path"] for source in manifest.sources]
    pairs = zip(units, manifest.parts, strict=True)
    return sorted({unit.path for unit, part in pairs if unit.digest() != part["source_sha256"]})


def damaged_parts(
    corpus: IndexedCorpus, manifest: CorpusManifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """A sentence for every part whose documents are not what its digest says.

    ``progress(tokens_done, tokens_in_all)`` is called on the way. The counts must be those of the corpus.
    """
    problems, first, tokens = [], 0, 0
    for part in manifest.parts:
        last = first + part["documents"] - 1
        if corpus.digest_part(first, part["documents"]) != part["sha256"]:
            problems.append(f"documents {first:,} to {last:,} are not those of the manifest")
        first, tokens = last + 1, tokens + part["tokens"]
        progress(tokens, manifest.tokens)
    if parts_digest(manifest.parts) != manifest.content_digest:
        problems.append("the content digest is not that of the parts")
    return problems


def load_manifest(prefix: str | os.PathLike) -> CorpusManifest | None:
    """The manifest of a corpus; None where there is none, as beside Megatron-LM's own files.

    Raises InputError when it is damaged, or a field is missing, unknown or of the wrong type.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values = read_json(path)
    except (ValueError, OSError) as error:
        raise InputError("manifest", str(path), f"cannot be read ({error}); preprocess again or remove it") from error
    if not isinstance(values, dict):
        raise InputError("manifest", str(path), "is not a JSON object; preprocess again or remove it")
    return _checked(path, values)


def _checked(path: Path, values: dict) -> CorpusManifest:
    known = {field.name: field for field in fields(CorpusManifest)}
    for name in sorted(values.keys() - known):
        raise InputError(f"{path} {name}", values[name], "unknown field: written by a newer version; update this one")
    for name, field in known.items():
        if name not in values and field.default is not MISSING:
            continue
        # a bool is an int to isinstance
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), _plain_types(field.type)):
            fix = "missing or of the wrong type; preprocess again or remove it"
            raise InputError(f"{path} {name}", values.get(name), fix)
    return CorpusManifest(**values)


def _plain_types(hint: object) -> tuple[type, ...]:
    """What ``isinstance`` takes for a field's type: ``list[int] | None`` is a list or None."""
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(each) or each for each in alternatives)

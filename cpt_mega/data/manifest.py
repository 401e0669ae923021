"""``PREFIX.manifest.json``: what a corpus was made of, by which tokenizer, and how to recognise it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import NotRequired, TypedDict, get_type_hints

from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.readers import Unit
from cpt_mega.errors import InputError
from cpt_mega.json_types import Count, Digest, type_problem
from cpt_mega.lineage import combined_digest, read_json, write_json

ALL, ASSISTANT = "all", "assistant"
MASKS = (ALL, ASSISTANT)  # which tokens count for the loss as targets


class Part(TypedDict):
    """Documents that were digested together. One that was made of an input says so, by the number of the source."""

    documents: Count
    tokens: Count
    sha256: Digest
    rejects: NotRequired[Count]
    source: NotRequired[Count]
    source_bytes: NotRequired[Count]
    source_sha256: NotRequired[str]


class Source(TypedDict):
    """An input; ``bytes`` and ``sha256`` are over its parts, ``include`` says which files of a folder."""

    path: str
    bytes: NotRequired[Count]
    sha256: NotRequired[str]
    field: NotRequired[str | None]
    include: NotRequired[list[str]]


class Shard(TypedDict):
    """Which of several shards; the plan is a digest of all units of the inputs."""

    index: Count
    shards: Count
    plan: str


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
        parts: in the order of their documents; ``sha256`` is a ``PartDigest``.
        sources: one per input.
        tool_version: of this project.
        token_bytes: UTF-8 bytes of the text, for bits per byte; None when it is not known.
        rejects: documents of the sources that are not in the corpus; with ``harmless_rejects`` of them nothing was lost.
        loss_mask: one of MASKS; all but ``all`` with a mask beside the tokens.
        chat_digest: of the chat template and the special tokens it names; None where documents were no chats.
        counted_tokens: how many count; None when it is not known.
        shard: when this is one of several.
    """

    tokenizer_digest: str
    vocab_size: Count
    eos_id: Count
    bos_id: Count | None
    dtype: str
    documents: Count
    tokens: Count
    content_digest: str
    parts: list[Part]
    sources: list[Source]
    tool_version: str
    token_bytes: Count | None = None
    rejects: Count = 0
    harmless_rejects: Count = 0
    loss_mask: str = ALL
    chat_digest: str | None = None
    counted_tokens: Count | None = None
    shard: Shard | None = None

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


def changed_sources(
    manifest: CorpusManifest, units: Sequence[Unit], digest: Callable[[int], str] | None = None
) -> list[str]:
    """Paths of sources that are not what the parts were made of; all of them when they make other units.

    ``digest(index)`` is asked for a unit's, where it may be known already.
    """
    if len(units) != len(manifest.parts):
        return [source["path"] for source in manifest.sources]
    digest = digest or (lambda index: units[index].digest())
    changed = [index for index, part in enumerate(manifest.parts) if digest(index) != part["source_sha256"]]
    return sorted({units[index].path for index in changed})


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
    hints = get_type_hints(CorpusManifest, include_extras=True)
    for name in sorted(values.keys() - known):
        raise InputError(f"{path} {name}", values[name], "unknown field: written by a newer version; update this one")
    for name, field in known.items():
        if name not in values and field.default is not MISSING:
            continue
        problem = type_problem(values[name], hints[name], name) if name in values else "missing"
        if problem is not None:
            raise InputError(f"{path} {name}", values.get(name), f"{problem}; preprocess again or remove it")
    manifest = CorpusManifest(**values)
    problem = _contradiction(manifest)
    if problem is not None:
        raise InputError("manifest", str(path), f"{problem}; preprocess again or remove it")
    return manifest


def _contradiction(manifest: CorpusManifest) -> str | None:
    """What a manifest says that cannot all be so."""
    for name in ("documents", "tokens") if manifest.parts else ():
        found = sum(part[name] for part in manifest.parts)
        if found != getattr(manifest, name):
            return f"its parts hold {found} {name}, it says {getattr(manifest, name)}"
    for number, part in enumerate(manifest.parts) if manifest.sources else ():
        if not {"source", "source_bytes", "source_sha256"} <= part.keys() or part["source"] >= len(manifest.sources):
            return f"part {number} does not say which of the {len(manifest.sources)} sources it was made of"
    counted = manifest.counted_tokens
    if counted is not None and counted > manifest.tokens:
        return f"{counted} of its {manifest.tokens} tokens count"
    if manifest.shard is not None and manifest.shard["index"] >= manifest.shard["shards"]:
        return f"it is shard {manifest.shard['index']} of {manifest.shard['shards']}"
    if manifest.loss_mask not in MASKS:
        return f"its loss_mask is none of {', '.join(MASKS)}"
    return None

"""What is in a corpus, whether it is what its manifest says, and a manifest for files that have none."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from cpt_mega import __version__
from cpt_mega.data.indexed import IndexedCorpus, documents_path
from cpt_mega.data.manifest import (
    ALL,
    ASSISTANT,
    CorpusManifest,
    changed_sources,
    damaged_parts,
    load_manifest,
    manifest_path,
    parts_digest,
)
from cpt_mega.data.rejects import rejects_path
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.data.units import plan_units, shard_of, survey
from cpt_mega.errors import InputError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CorpusSummary:
    """Counts of a corpus; lengths are tokens of a document, quantiles over documents.

    ``manifest`` is None where there is none.
    """

    prefix: str
    documents: int
    tokens: int
    empty_documents: int
    dtype: str
    lengths: dict[str, float]
    manifest: dict | None


def summarise(corpus: IndexedCorpus) -> CorpusSummary:
    """What can be told without reading the tokens. Raises InputError for a damaged manifest."""
    lengths, manifest = corpus.document_lengths, load_manifest(corpus.prefix)
    quantiles = {"least": 0.0, "median": 0.5, "p99": 0.99, "most": 1.0}
    found = {name: float(np.quantile(lengths, share)) for name, share in quantiles.items()} if len(lengths) else {}
    if len(lengths):
        found["mean"] = float(lengths.mean())
    return CorpusSummary(
        corpus.prefix,
        corpus.documents,
        corpus.tokens,
        int((lengths == 0).sum()),
        corpus.dtype.name,
        found,
        asdict(manifest) if manifest else None,
    )


def document_ids(corpus: IndexedCorpus, document: int) -> list[int]:
    """All tokens of a document. Raises InputError when there is no such document."""
    if not 0 <= document < corpus.documents:
        raise InputError("--document", document, f"{corpus.prefix} holds documents 0 to {corpus.documents - 1}")
    return corpus.read(document, 0, corpus.length_of(document)).tolist()


def load_own_tokenizer(corpus: IndexedCorpus, path: str) -> TextTokenizer:
    """The tokenizer at a path. Raises InputError when the manifest tells of another one."""
    tokenizer, manifest = TextTokenizer.load(path), load_manifest(corpus.prefix)
    if manifest is not None and manifest.tokenizer_digest != tokenizer.digest:
        fix = f"the corpus was made by tokenizer {manifest.tokenizer_digest[:12]}, this is {tokenizer.digest[:12]}"
        raise InputError("--tokenizer", path, fix)
    return tokenizer


def find_problems(corpus: IndexedCorpus, progress: Progress = lambda done, total: None) -> list[str]:
    """What is wrong with a corpus beside its manifest, a sentence each; empty when all is as it says.

    Looks at counts, the content digest, the range of ids, EOS and BOS of every document, and the sources that are still
    where they were. Raises InputError when there is no manifest, or it is damaged.
    """
    manifest = load_manifest(corpus.prefix)
    if manifest is None:
        fix = "there is none; --write-manifest --tokenizer DIR makes one"
        raise InputError("manifest", str(manifest_path(corpus.prefix)), fix)
    problems = []
    try:
        manifest.check_against(corpus)
    except InputError as error:
        problems.append(str(error))
        return problems
    problems += damaged_parts(corpus, manifest, progress)
    problems += _wrong_tokens(corpus, manifest.vocab_size, manifest.eos_id, manifest.bos_id)
    return problems + _missing_files(corpus, manifest) + _changed_sources(manifest)


def make_manifest(
    corpus: IndexedCorpus, tokenizer: TextTokenizer, progress: Progress = lambda done, total: None
) -> CorpusManifest:
    """A manifest for files that Megatron-LM wrote; BOS is said to be there when every document begins with it.

    Raises InputError when ids lie outside the vocabulary or documents do not end in the tokenizer's EOS: the files are
    then another tokenizer's, or were made without ``--append-eod``.
    """
    first, _ = corpus.ends
    has_bos = tokenizer.bos_id is not None and corpus.documents > 0 and bool((first == tokenizer.bos_id).all())
    bos_id = tokenizer.bos_id if has_bos else None
    problems = _wrong_tokens(corpus, tokenizer.vocab_size, tokenizer.eos_id, bos_id)
    if problems:
        fix = "; ".join(problems) + ". Preprocess again with this tokenizer, or train on the files without a manifest"
        raise InputError("--write-manifest", corpus.prefix, fix)
    part = {"documents": corpus.documents, "tokens": corpus.tokens, "sha256": corpus.digest_part(0, corpus.documents)}
    progress(corpus.tokens, corpus.tokens)
    return CorpusManifest(
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=bos_id,
        dtype=corpus.dtype.name,
        documents=corpus.documents,
        tokens=corpus.tokens,
        content_digest=parts_digest([part]),
        parts=[part],
        sources=[],
        tool_version=__version__,
        loss_mask=ASSISTANT if corpus.has_mask else ALL,
    )


def _wrong_tokens(corpus: IndexedCorpus, vocab_size: int, eos_id: int, bos_id: int | None) -> list[str]:
    problems = []
    outside = sum(int(((block < 0) | (block >= vocab_size)).sum()) for block in corpus.blocks())
    if outside:
        problems.append(f"{outside:,} token ids lie outside the vocabulary of {vocab_size:,}")
    first, last = corpus.ends
    for tokens, wanted, words in ((last, eos_id, "end in EOS"), (first, bos_id, "begin with BOS")):
        wrong = np.flatnonzero(tokens != wanted) if wanted is not None else ()
        if len(wrong):
            where = f"the first is document {wrong[0]}"
            problems.append(f"{len(wrong):,} of {corpus.documents:,} documents do not {words} {wanted} ({where})")
    return problems


def _missing_files(corpus: IndexedCorpus, manifest: CorpusManifest) -> list[str]:
    """What stands beside a corpus and is gone: the account of the rejects, and the paths of documents."""
    prefixes = [shard.prefix for shard in corpus.shards]
    # which shards had rejects, the manifest of all does not say
    expected = [rejects_path(prefixes[0])] if manifest.rejects and len(prefixes) == 1 else []
    if any("include" in source for source in manifest.sources):
        expected += map(documents_path, prefixes)
    return [f"{path} is missing" for path in expected if not path.exists()]


def _changed_sources(manifest: CorpusManifest) -> list[str]:
    """Sources that are there and are not what they were. One that is gone is no fault of the corpus."""
    sources = manifest.sources
    if not sources or not all(os.path.exists(source["path"]) for source in sources):
        return []
    inputs = [survey([source["path"]], source.get("include", ("*",)))[0] for source in sources]
    units = plan_units(inputs)
    units = shard_of(units, manifest.shard["index"], manifest.shard["shards"]) if manifest.shard else units
    return [f"source {path} has changed since" for path in changed_sources(manifest, units)]

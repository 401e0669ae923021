"""A corpus that several machines made, one shard each: ``PREFIX.shard-00002-of-00008.bin`` and so on.

Shards are consecutive units of the inputs (``units.shard_of``), so the merged corpus has the documents of an unsharded one
in the same order, and the same manifest. Merging writes two small files; no token is copied.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cpt_mega.data.indexed import IndexedCorpus, corpus_files, shards_path
from cpt_mega.data.manifest import CorpusManifest, describe_sources, load_manifest, parts_digest, strip_measures
from cpt_mega.errors import InputError
from cpt_mega.lineage import write_json

SAME = ("tokenizer_digest", "vocab_size", "eos_id", "bos_id", "dtype", "tool_version", "loss_mask", "chat_digest")
SUMMED = ("documents", "tokens", "token_bytes", "rejects", "harmless_rejects", "counted_tokens")


def shard_prefix(prefix: str, index: int, shards: int) -> str:
    """Where a shard of a corpus lies."""
    return f"{prefix}.shard-{index:05d}-of-{shards:05d}"


def merge_shards(prefix: str, max_reject_share: float = 0.001) -> CorpusManifest:
    """Makes one corpus of the shards of PREFIX: ``PREFIX.shards.json`` and ``PREFIX.manifest.json``.

    Raises InputError when shards are missing, of several runs, or not those of their manifests, when more documents than
    ``max_reject_share`` were rejected in all, or an unsharded corpus stands there.
    """
    if corpus_files(prefix)[1].exists():
        raise InputError("PREFIX", prefix, "a corpus of its own stands there; remove it, or merge under another name")
    names = _all_shards(prefix)
    manifests = [_shard_manifest(name) for name in names]
    _check_same(names, manifests)
    parts = [part for manifest in manifests for part in manifest.parts]
    sources = describe_sources(strip_measures(manifests[0].sources), parts)
    merged = CorpusManifest(
        **{name: getattr(manifests[0], name) for name in SAME},
        **{name: sum(getattr(manifest, name) for manifest in manifests) for name in SUMMED},
        content_digest=parts_digest(parts),
        parts=parts,
        sources=sources,
    )
    if merged.fault_share > max_reject_share:
        counts = f"{merged.faults} of {merged.documents_in} documents were rejected"
        fix = f"{counts}: see {prefix}.shard-*.rejects.jsonl, or raise the limit"
        raise InputError("--max-reject-share", max_reject_share, fix)
    if not merged.documents:
        raise InputError("PREFIX", prefix, "no shard of it holds a document with text")
    write_json(shards_path(prefix), [os.path.basename(name) for name in names])
    merged.check_against(IndexedCorpus(prefix))
    merged.write(prefix)
    return merged


def _all_shards(prefix: str) -> list[str]:
    """The prefixes of all shards, in order."""
    folder, base = os.path.split(prefix)
    pattern = re.compile(re.escape(base) + r"\.shard-(\d{5})-of-(\d{5})\.manifest\.json")
    found = sorted(filter(None, map(pattern.fullmatch, os.listdir(folder or "."))), key=lambda match: match.groups())
    counts = sorted({int(match[2]) for match in found})
    if len(counts) != 1:
        fix = "no shard of it is complete"
        if counts:
            others = " and ".join(f"*.shard-*-of-{count:05d}.*" for count in counts)
            fix = f"{others} lie there; remove those of other runs"
        raise InputError("PREFIX", prefix, fix)
    missing = sorted(set(range(counts[0])) - {int(match[1]) for match in found})
    if missing:
        named = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise InputError("PREFIX", prefix, f"{len(missing)} of {counts[0]} shards are not complete: {named}; run them")
    return [shard_prefix(prefix, index, counts[0]) for index in range(counts[0])]


def _shard_manifest(prefix: str) -> CorpusManifest:
    manifest = load_manifest(prefix)
    if not manifest.shard:
        raise InputError(
            f"{prefix}.manifest.json", "shard", "is not there; make it by tools/preprocess_data.py --shard"
        )
    manifest.check_against(IndexedCorpus(prefix))
    return manifest


def _check_same(names: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    first = manifests[0]
    for name, manifest in zip(names, manifests, strict=True):
        for field in SAME:
            if getattr(manifest, field) != getattr(first, field):
                fix = f"{names[0]} has {getattr(first, field)}; make all shards in one way"
                raise InputError(f"{Path(name).name} {field}", getattr(manifest, field), fix)
        if manifest.shard["plan"] != first.shard["plan"] or strip_measures(manifest.sources) != strip_measures(
            first.sources
        ):
            fix = f"{names[0]} had other inputs, or they have changed between; make all shards of the same ones"
            raise InputError(f"{Path(name).name} sources", [source["path"] for source in manifest.sources], fix)

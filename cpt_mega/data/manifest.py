"""``PREFIX.manifest.json``: what a corpus was made of, by which tokenizer, and how to recognise it."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from cpt_mega.data.indexed import IndexedCorpus, corpus_files
from cpt_mega.errors import InputError
from cpt_mega.lineage import write_json

BLOCK_BYTES = 1 << 20


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
        content_digest: SHA-256 over ``.bin`` followed by ``.idx``.
        sources: one ``{"path", "bytes", "sha256", "field"}`` per input file.
        tool_version: of this project.
        token_bytes: UTF-8 bytes of the text, for bits per byte; None when it is not known.
        rejects: documents of the sources that are not in the corpus.
    """

    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    dtype: str
    documents: int
    tokens: int
    content_digest: str
    sources: list[dict]
    tool_version: str
    token_bytes: int | None = None
    rejects: int = 0

    def write(self, prefix: str | os.PathLike) -> None:
        """Writes the sidecar of ``prefix``, whole or not at all."""
        write_json(manifest_path(prefix), asdict(self))

    def check_against(self, corpus: IndexedCorpus) -> None:
        """Raises InputError when the counts or the dtype are not those of the corpus beside it."""
        for name, found in (("documents", corpus.documents), ("tokens", corpus.tokens), ("dtype", corpus.dtype.name)):
            if getattr(self, name) != found:
                fix = f"the corpus beside it has {found}; remove a manifest of another corpus, or preprocess again"
                raise InputError(f"{manifest_path(corpus.prefix)} {name}", getattr(self, name), fix)


def manifest_path(prefix: str | os.PathLike) -> Path:
    """``PREFIX.manifest.json``."""
    return Path(f"{prefix}.manifest.json")


def content_digest(prefix: str | os.PathLike, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """SHA-256 over the bytes of ``PREFIX.bin`` followed by those of ``PREFIX.idx``, as hex.

    ``progress(bytes_done, bytes_in_all)`` is called on the way.
    """
    total, done = hashlib.sha256(), 0
    size = sum(os.path.getsize(path) for path in corpus_files(prefix))
    for path in corpus_files(prefix):
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                total.update(block)
                done += len(block)
                progress(done, size)
    return total.hexdigest()


def load_manifest(prefix: str | os.PathLike) -> CorpusManifest | None:
    """The manifest of a corpus; None where there is none, as beside Megatron-LM's own files.

    Raises InputError when it is damaged, or a field is missing, unknown or of the wrong type.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
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
        value, kind = values.get(name), getattr(field.type, "__origin__", field.type)
        # a bool is an int to isinstance
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{path} {name}", value, "missing or of the wrong type; preprocess again or remove it")
    return CorpusManifest(**values)

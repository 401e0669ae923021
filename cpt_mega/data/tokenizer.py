"""Text to token ids and back, by the tokenizer that comes with a model.

Two kinds of tokenizers behind one small interface (``TextEncoder``); faster ways to the same ids are in ``routes``.
Special tokens are never added by the encoders: BOS and EOS are this module's business, and follow the tokenizer's own
habit. A special token that occurs literally in a text is text: it is spelt out, as transformers does under
``split_special_tokens=True``. Otherwise source code that mentions ``<|endoftext|>`` would end documents in their middle,
and a scraped page could speak in the template's own voice.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from cpt_mega.errors import InputError
from cpt_mega.lineage import file_digest, read_json

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
MODEL_CONFIGS = ("config.json", "generation_config.json")
PROBE_TEXT = "a"


class TextEncoder(Protocol):
    """What an encoder must do; ids are those of the model's own tokenizer, whatever the route."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""


class HFEncoder:
    """A Hugging Face fast tokenizer, run by the ``tokenizers`` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # Either would cut or fill documents without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See TextEncoder."""
        return [done.ids for done in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See TextEncoder."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePieceEncoder:
    """A SentencePiece ``.model``, BPE or Unigram."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See TextEncoder."""
        return self.processor.encode(list(texts), num_threads=1) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """See TextEncoder."""
        return self.processor.decode([int(token) for token in ids])


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and its habits.

    Attributes:
        path: the file it was read from.
        encoder: turns text into ids.
        digest: SHA-256 of ``tokenizer.json`` or of the ``.model``.
        vocab_size: highest id plus one.
        eos_id: ends a document.
        bos_id: begins one; None when the tokenizer has no such token.
        adds_bos: whether the tokenizer itself puts BOS before a text.
        added: tokens as strings that are looked for before a text is cut into words.
        specials: those of them that are special: marked so, or named in the configuration.
    """

    path: Path
    encoder: TextEncoder
    digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    adds_bos: bool
    added: tuple[str, ...] = ()
    specials: frozenset[str] = frozenset()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextTokenizer":
        """Loads a folder with ``tokenizer.json`` or ``tokenizer.model``, or either file itself.

        Raises InputError when there is no tokenizer, it cannot be read, or it has no EOS.
        """
        path = Path(path)
        candidates = [path / HF_FILE, path / SENTENCEPIECE_FILE] if path.is_dir() else [path]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            fix = f"give a folder with {HF_FILE} or {SENTENCEPIECE_FILE}, or a SentencePiece .model"
            raise InputError("tokenizer", str(path), fix)
        return _load_hf(cls, found) if found.suffix == ".json" else _load_sentencepiece(cls, found)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return self.encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.encoder.decode(ids)

    def stored_documents(
        self, tokens: np.ndarray, lengths: np.ndarray, bos: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``document_ids`` of texts that lie one behind the other.

        Args:
            tokens: ids [sum of lengths].
            lengths: of each text, int64 [texts].

        Returns tokens and lengths of the documents that are not empty, and the indices of the texts they are of.
        """
        filled = np.flatnonzero(lengths)
        ends = np.cumsum(lengths)[filled]
        first, last = tokens[ends - lengths[filled]], tokens[ends - 1]
        if (last == self.eos_id).any() or (self.bos_id is not None and (first == self.bos_id).any()):
            return self._stored_one_by_one(tokens, lengths, bos)
        front = [np.array([self.bos_id], tokens.dtype)] if bos else []
        back, pieces = np.array([self.eos_id], tokens.dtype), []
        for start, end in zip((ends - lengths[filled]).tolist(), ends.tolist(), strict=True):
            pieces += (*front, tokens[start:end], back)
        return np.concatenate(pieces or [tokens]), lengths[filled] + bos + 1, filled

    def _stored_one_by_one(self, tokens: np.ndarray, lengths: np.ndarray, bos: bool) -> tuple[np.ndarray, ...]:
        documents = [self.document_ids(ids.tolist(), bos) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]
        filled = [index for index, document in enumerate(documents) if document]
        stored = np.array([len(documents[index]) for index in filled], np.int64)
        joined = [token for index in filled for token in documents[index]]
        return np.array(joined, tokens.dtype), stored, np.array(filled, np.int64)

    def document_ids(self, ids: list[int], bos: bool | None = None) -> list[int]:
        """A document as it is stored: BOS if asked (by default: if the tokenizer adds one), the text, one EOS.

        BOS or EOS that the text already carries at that place is not doubled. Empty when nothing but they is left.
        """
        start, end = self.text_range(ids)
        if start == end:
            return []
        leading = [self.bos_id] if (self.adds_bos if bos is None else bos) else ids[:start]
        return [*leading, *ids[start:end], self.eos_id]

    def text_range(self, ids: list[int]) -> tuple[int, int]:
        """Where the text begins and ends: a BOS before and EOS behind are left out."""
        end = len(ids)
        while end and ids[end - 1] == self.eos_id:
            end -= 1
        return (1 if end and ids[0] == self.bos_id else 0), end


def _load_hf(cls: type[TextTokenizer], path: Path) -> TextTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError("tokenizer", str(path), f"cannot be read ({error}); copy it again") from error
    named = named_specials(path.parent).values()
    # transformers makes them special whatever the file says; the library alone would find them in texts
    known = (name for name in named if tokenizer.token_to_id(name) is not None)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])
    tokenizer.encode_special_tokens = True  # literally in a text they are text
    encoder = HFEncoder(tokenizer)
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    bos_id, eos_id = (_special_id(path.parent, name, tokenizer.token_to_id) for name in ("bos", "eos"))
    with_specials = tokenizer.encode(PROBE_TEXT, add_special_tokens=True).ids
    return cls(
        path=path,
        encoder=encoder,
        digest=file_digest(path),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        eos_id=_required_eos(path, eos_id),
        bos_id=bos_id,
        adds_bos=bos_id is not None and with_specials[:1] == [bos_id],
        added=tuple(token.content for token in added),
        specials=frozenset(token.content for token in added if token.special),
    )


def _load_sentencepiece(cls: type[TextTokenizer], path: Path) -> TextTokenizer:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError("tokenizer", str(path), f"not a SentencePiece model ({error}); give another file") from error
    bos_id, eos_id = (token if token >= 0 else None for token in (processor.bos_id(), processor.eos_id()))
    return cls(
        path=path,
        encoder=SentencePieceEncoder(processor),
        digest=file_digest(path),
        vocab_size=processor.get_piece_size(),
        eos_id=_required_eos(path, eos_id),
        bos_id=bos_id,
        adds_bos=bos_id is not None and bool(read_config(path.parent / TOKENIZER_CONFIGS[0]).get("add_bos_token")),
    )


def named_specials(folder: Path) -> dict[str, str]:
    """The special tokens that a tokenizer's configuration names, by their name there: ``bos_token`` and so on."""
    found: dict[str, str] = {}
    for config in reversed(TOKENIZER_CONFIGS):  # the first has the last word
        values = read_config(folder / config)
        extra = values.get("extra_special_tokens")
        for name, token in (values | (extra if isinstance(extra, dict) else {})).items():
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and name.endswith("_token"):
                found[name] = token
    return found


def _required_eos(path: Path, eos_id: int | None) -> int:
    if eos_id is None:
        fix = 'has no end-of-sequence token, and documents must end in one; name it as "eos_token" in '
        raise InputError("tokenizer", str(path), fix + f"{TOKENIZER_CONFIGS[0]} beside it")
    return eos_id


def _special_id(folder: Path, name: str, token_to_id: Callable[[str], int | None]) -> int | None:
    """The id of ``bos`` or ``eos``: the tokenizer's own files name a token, the model's name an id."""
    for config in TOKENIZER_CONFIGS:
        token = read_config(folder / config).get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found = token_to_id(token)
            if found is None:
                raise InputError(f"{folder / config} {name}_token", token, f"is not in the vocabulary of {HF_FILE}")
            return found
    for config in MODEL_CONFIGS:
        found = read_config(folder / config).get(f"{name}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return None


def read_config(path: Path) -> dict:
    """The values of a tokenizer's or a model's JSON file; none when it is not there. Raises InputError when damaged."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except ValueError as error:
        raise InputError("tokenizer", str(path), f"is not JSON ({error}); copy it again") from error
    return values if isinstance(values, dict) else {}

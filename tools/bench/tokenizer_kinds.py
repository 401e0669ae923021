"""Tokenizers of the kinds that open-weight families have, trained here: same type, same pattern, same habits.

None of the real ones can be had on a machine without network, and what an encoder must get right is the kind: how words
are cut, what is normalised, how unknown letters are spelt.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from cpt_mega.data import word_patterns
from tools.machine_model import byte_level_tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>"]
ADDED = "<tool>"  # not special: found in texts
BLANK = "▁"
LONGEST_LINE = 2000  # SentencePiece's trainers are for sentences


def _byte_level(pattern: str | None, normalizer: normalizers.Normalizer | None = None, **options) -> Callable:
    return lambda texts, vocab_size: byte_level_tokenizer(texts, vocab_size, SPECIALS, pattern, normalizer, **options)


def _byte_fallback(prepend: bool, cut: pre_tokenizers.PreTokenizer | None) -> Callable:
    """SentencePiece-like BPE in ``tokenizer.json``: blanks are letters, and what is unknown is spelt in bytes."""

    def train(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        # Words are cut for the training alone, so that no token goes over a blank; the real ones have none either.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK)
        special = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(_lines(texts), trainer)
        steps = [normalizers.Prepend(BLANK)] * prepend + [normalizers.Replace(" ", BLANK)]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), cut
        return tokenizer

    return train


def _unigram(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *SPECIALS]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    return tokenizer


JSON_KINDS: dict[str, Callable[[Sequence[str], int], tokenizers.Tokenizer]] = {
    "GPT-2": _byte_level(None),
    "Llama 3": _byte_level(word_patterns.LLAMA3, ignore_merges=True),
    "Qwen 2.5, 3": _byte_level(word_patterns.QWEN, normalizers.NFC()),
    "Mistral (Tekken)": _byte_level(word_patterns.TEKKEN, ignore_merges=True),
    "Llama 2, Mistral 7B": _byte_fallback(True, None),
    "Gemma": _byte_fallback(False, pre_tokenizers.Split(" ", "merged_with_previous")),
    "Unigram": _unigram,
}
SENTENCEPIECE_KINDS = {"SentencePiece BPE (.model)": "bpe", "SentencePiece Unigram (.model)": "unigram"}
KINDS = (*JSON_KINDS, *SENTENCEPIECE_KINDS)


def train_kind(name: str, texts: Sequence[str], vocab_size: int, folder: Path) -> Path:
    """Trains a tokenizer of a kind into a folder that ``TextTokenizer.load`` takes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in SENTENCEPIECE_KINDS:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_lines(texts)),
            model_prefix=str(folder / "tokenizer"),
            model_type=SENTENCEPIECE_KINDS[name],
            vocab_size=vocab_size,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return folder
    tokenizer = JSON_KINDS[name](texts, vocab_size)
    tokenizer.add_tokens([tokenizers.AddedToken(ADDED, normalized=False)])  # as those of Qwen and Gemma are
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": SPECIALS[0], "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def _lines(texts: Iterable[str]) -> list[str]:
    return [line[:LONGEST_LINE] for text in texts for line in text.splitlines() if line.strip()]

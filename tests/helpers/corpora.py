"""Small tokenizers and corpora for tests."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.indexed_writer import IndexedCorpusWriter
from cpt_mega.data.packing import plan_rows
from cpt_mega.data.sources import Source

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, Straße, 北京, 🙂",
    "x",
    "for line in open(path):\n    print(line.strip())\n" * 5,
]

# as transformers writes a token with its flags
ADDED_TOKEN = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write_bpe_tokenizer(folder: Path, *, bos: bool = True, eos: bool = True, adds_bos: bool = False) -> Path:
    """A byte-level BPE tokenizer folder; ``adds_bos`` puts BOS into the post-processor, as Llama 3 does."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>"] * bos + ["<|eos|>"] * eos
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<|bos|>"} if bos else {}
    config |= {"eos_token": ADDED_TOKEN | {"content": "<|eos|>"}} if eos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, lines: list) -> Path:
    """Writes texts as ``{"text": ...}`` lines; bytes go in as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps({"text": line}).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def write_corpus(prefix: Path, documents: list, dtype: type = np.int32) -> IndexedCorpus:
    """A corpus of the given token lists."""
    with IndexedCorpusWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return IndexedCorpus(prefix)


def counting_corpus(prefix: Path, lengths: list[int], first: int = 0) -> IndexedCorpus:
    """Documents of given lengths whose tokens count up through the corpus, so that every token is unique."""
    ends = np.cumsum(lengths) + first
    return write_corpus(prefix, [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)])


def masked_corpus(prefix: Path, lengths: list[int], counts: list) -> IndexedCorpus:
    """``counting_corpus`` with a loss mask: ``counts`` says of each of its tokens whether it counts."""
    counting_corpus(prefix, lengths)
    mask_path(prefix).write_bytes(bytes(counts))
    return IndexedCorpus(prefix)


def make_source(corpus: IndexedCorpus, name: str, weight: float, seq_length: int, role: str = "domain") -> Source:
    """A source over a corpus, packed by best fit."""
    return Source(name, role, corpus, plan_rows(corpus.document_lengths, seq_length, "best_fit"), weight)

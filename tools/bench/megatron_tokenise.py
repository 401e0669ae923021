"""Megatron-LM's way to a corpus, as its ``tools/preprocess_data.py`` goes: for ``tokenise.py`` to measure against.

One document at a time, core's own Hugging Face tokenizer in a pool of processes, ids as Python lists through a pipe to one
writer, core's ``IndexedDatasetBuilder``. Usage: ``megatron_tokenise.py INPUT TOKENIZER_DIR PREFIX WORKERS``.
"""

import json
import multiprocessing
import os
import sys

CHUNK = 32  # lines that are sent to a process at once; Megatron-LM's own number


class Encoder:
    """A process' tokenizer, and one line to ids."""

    def __init__(self, tokenizer: str):
        self.path = tokenizer

    def start(self) -> None:
        from megatron.core.tokenizers import MegatronTokenizer

        Encoder.tokenizer = MegatronTokenizer.from_pretrained(self.path, metadata_path={"library": "huggingface"})

    def encode(self, line: str) -> tuple[list[int], int]:
        ids = list(Encoder.tokenizer.tokenize(json.loads(line)["text"]))
        ids.append(Encoder.tokenizer.eod)
        return ids, len(line)


def main() -> None:
    path, tokenizer, prefix, workers = sys.argv[1:]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as its tool has it under more than one worker
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = Encoder(tokenizer)
    encoder.start()  # the parent asks it for the size of the vocabulary
    dtype = DType.optimal_dtype(Encoder.tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with multiprocessing.Pool(int(workers), initializer=encoder.start) as pool, open(path, encoding="utf-8") as lines:
        for ids, _ in pool.imap(encoder.encode, lines, CHUNK):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()

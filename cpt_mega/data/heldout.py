"""Fixed evaluation items: the same documents at every look, whatever the run does in between."""

import numpy as np

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.rows import check_ids
from cpt_mega.errors import InputError


def heldout_documents(
    corpus: IndexedCorpus, max_tokens: int, vocab_size: int
) -> list[tuple[int, np.ndarray, np.ndarray | None]]:
    """The documents among the first ``max_tokens`` tokens of a corpus that have a target; the last may be cut.

    Returns ``(document, token ids int64 [n > 1], which of them count bool [n], None for all)``. Raises InputError when that
    leaves nothing to evaluate, and for a token outside the vocabulary.
    """
    before = np.cumsum(corpus.document_lengths) - corpus.document_lengths
    taken = np.clip(max_tokens - before, 0, corpus.document_lengths)
    found = []
    for document in np.flatnonzero(taken > 1).tolist():  # a document's first token is context, not a target
        tokens = corpus.read(document, 0, int(taken[document]))
        check_ids(corpus, document, tokens, vocab_size)
        counts = corpus.read_mask(document, 0, len(tokens)).astype(bool) if corpus.has_mask else None
        if counts is None or counts[1:].any():
            found.append((document, tokens, counts))
    if not found:
        raise InputError("eval.sets path", corpus.prefix, f"no target among the first {max_tokens} tokens")
    return found

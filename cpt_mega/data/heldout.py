"""Fixed evaluation items: the same rows at every look, whatever the run does in between."""

import numpy as np

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.packing import RowPlan, plan_rows
from cpt_mega.errors import InputError


def heldout_rows(corpus: IndexedCorpus, seq_length: int, max_tokens: int) -> RowPlan:
    """The first ``max_tokens`` tokens of a held-out corpus, as rows in document order; nothing is random.

    Raises InputError when that leaves nothing to evaluate.
    """
    before = np.cumsum(corpus.document_lengths) - corpus.document_lengths
    taken = np.clip(max_tokens - before, 0, corpus.document_lengths)
    if taken.max(initial=0) < 2:  # a document's first token is context, not a target
        raise InputError("eval.sets path", corpus.prefix, f"no target among the first {max_tokens} tokens")
    return plan_rows(taken, seq_length, "concat")

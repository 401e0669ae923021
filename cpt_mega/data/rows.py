"""One packed row: ids, targets, mask, and where its documents end.

The contract that no document leaks into another:

- ``doc_lengths`` names every document of the row, in order, and sums to the row length. Attention stays within them
  and positions restart at each; that is the model's part of the contract.
- A target is the next token of the same document, never the first of the next one. The last token of a document has
  no target: mask 0.
- A piece whose document goes on in another row ends with the document's true next token as target: it is context
  that the model has not seen, so a legitimate target, and no token of a split document goes untrained but the first.
- Padding is one more document at the end of the row, with mask 0: it attends to itself and nothing attends to it.
- The mask goes by position, never by id: an EOS that is a target counts, whatever the padding id.
- A corpus with a loss mask of its own (chats of which only the assistant's turns count) leaves out the targets that it
  does not count; they stay context.
"""

from dataclasses import dataclass

import numpy as np

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.packing import RowPlan
from cpt_mega.errors import InputError

PAD_ID = 0  # masked wherever it stands, so any id that the embedding holds will do


@dataclass(frozen=True)
class PackedRow:
    """A row of S tokens.

    Attributes:
        ids: int64 [S].
        labels: int64 [S], the target of each position; the padding id where ``loss_mask`` is 0.
        loss_mask: float32 [S], 1 where there is a target.
        doc_lengths: tokens of each document, padding last; sums to S.
    """

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    doc_lengths: list[int]


def build_row(
    corpus: IndexedCorpus,
    plan: RowPlan,
    row: int,
    seq_length: int,
    pad_id: int = PAD_ID,
    vocab_size: int | None = None,
) -> PackedRow:
    """Reads row ``row`` of a plan over a corpus into ``seq_length`` tokens.

    Raises InputError when the row does not fit, or when a token lies outside ``vocab_size`` (if given): such an id
    would read another row of the embedding, or crash a GPU kernel far from here.
    """
    ids, labels = np.full((2, seq_length), pad_id, np.int64)
    loss_mask = np.zeros(seq_length, np.float32)
    doc_lengths, at = [], 0
    for document, start, length in plan.pieces(row):
        if at + length > seq_length:
            raise InputError("train.seq_length", seq_length, f"the plan was made for rows of {plan.seq_length} tokens")
        goes_on = start + length < corpus.length_of(document)
        tokens = corpus.read(document, start, length + 1 if goes_on else length)
        if vocab_size is not None:
            check_ids(corpus, document, tokens, vocab_size)
        ids[at : at + length] = tokens[:length]
        targets = len(tokens) - 1
        # by the target, which is the next token: the corpus says which of its tokens count
        counts = corpus.read_mask(document, start, len(tokens))[1:]
        labels[at : at + targets] = np.where(counts, tokens[1:], pad_id)
        loss_mask[at : at + targets] = counts
        doc_lengths.append(length)
        at += length
    if at < seq_length:
        doc_lengths.append(seq_length - at)
    return PackedRow(ids, labels, loss_mask, doc_lengths)


def counted_tokens(corpus: IndexedCorpus, plan: RowPlan, row: int) -> int:
    """Real tokens of a row that the corpus lets count: all of them where it has no loss mask."""
    if not corpus.has_mask:
        return plan.tokens_of(row)
    return sum(int(corpus.read_mask(*piece).sum(dtype=np.int64)) for piece in plan.pieces(row))


def check_ids(corpus: IndexedCorpus, document: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises InputError for a token id int64 [n] of a document that lies outside a vocabulary."""
    # one pass finds both ends: a negative id is a huge unsigned one
    if int(tokens.view(np.uint64).max()) >= vocab_size:
        bad = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
        fix = f"outside the model's vocabulary of {vocab_size}; preprocess with the model's tokenizer"
        raise InputError(f"token id in {corpus.prefix}.bin, document {document}", bad, fix)

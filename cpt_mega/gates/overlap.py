"""Which items of probes occur in a corpus that is trained on: a score on those tells what was learnt by heart.

An item is found when at least half of its n-grams of 13 tokens occur in documents of the corpus (n-grams of 13: GPT-3, arXiv
2005.14165 appendix C; the share of them: PaLM, 2204.02311). Of an item with fewer tokens the whole text must occur; items of
fewer than 6 occur by chance, and are not judged.

Each place of a corpus has a polynomial hash of the tokens from there on, by running sums: sum of t[i + k] B^k modulo 2^64. Two
filters by bits of it let few places pass, whose whole hash is then looked up; a hit counts when the tokens are the same, and
of one document. So hashes decide how fast it goes, and never what is found. For items shorter than 13 tokens it is the
hash of their first 6 that must pass.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.gates.probes.probe import Content

N_GRAM_TOKENS = 13
LEAST_TOKENS = 6
FOUND_SHARE = 0.5
MOST_TOKENS = 4_000_000_000  # of a corpus that are looked at
SPAN_TOKENS = 1 << 20  # that are read at once
CHUNK_TOKENS = 1 << 16  # whose hashes lie in the caches together
MOST_THREADS = 16
_FILTER_BITS = 5  # of the 2**5 entries that a filter has for each n-gram, all but one let nothing pass
_MOST_FILTER_BITS = 27  # 128 MiB
_OTHER = np.uint64(0x9E3779B97F4A7C15)  # brings lower bits of a hash to the top: a filter of its own


@dataclass(frozen=True)
class Overlap:
    """What of a probe occurs in a corpus.

    Attributes:
        judged: items that were looked for.
        short: items that were not, for they have too few tokens.
        found: ids of those that occur, in their order.
    """

    judged: int
    short: int
    found: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a shard: the n-grams that begin there are looked at."""

    shard: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.last - self.first


def spans_of(corpus: IndexedCorpus, most_tokens: int = MOST_TOKENS, span_tokens: int = SPAN_TOKENS) -> list[Span]:
    """What of a corpus is looked at: all of it, or spans that are evenly spread over it, of about ``most_tokens`` in all."""
    found = [
        Span(number, first, min(first + span_tokens, shard.tokens))
        for number, shard in enumerate(corpus.shards)
        for first in range(0, shard.tokens, span_tokens)
    ]
    if corpus.tokens <= most_tokens:
        return found
    kept = min(max(1, most_tokens // span_tokens), len(found))
    return [found[place * len(found) // kept] for place in range(kept)]


def find_items(
    contents: Mapping[str, Sequence[Content]],
    corpus: IndexedCorpus,
    spans: Sequence[Span] | None = None,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Overlap]:
    """Which items of each probe occur in a corpus; the same for any number of threads and any spans that cover it.

    Args:
        contents: of the items of each probe.
        spans: what is looked at; None: ``spans_of(corpus)``.
        threads: that read and look; None: one for each core of this process, 16 at most.
        advance: told how many tokens were looked at since it was called last, in the thread that called; what it raises ends
            the search.

    Measured on one core of a Xeon with AVX-512 (numpy 2.4, a busy machine): 73 million tokens a second for 1,600 items of 40
    tokens, 57 where some are shorter than 13, 47 for 500,000 tokens of documents, 33 for these and the short ones. Takes about
    12 MiB a thread, and 300 bytes for each n-gram of the items.

    Raises FaultError for a corpus that was cut.
    """
    grams = _ItemGrams(contents)
    if grams.tables:
        spans = spans_of(corpus) if spans is None else spans
        workers = ThreadPoolExecutor(threads or min(MOST_THREADS, len(os.sched_getaffinity(0))))
        try:
            for tokens in workers.map(lambda span: _look(grams, corpus, span), spans):
                advance(tokens)
        finally:
            workers.shutdown(cancel_futures=True)
    return grams.overlaps()


@dataclass
class _Table:
    """Different n-grams of one length.

    Attributes:
        tokens: of each n-gram int64 [n-grams, length].
        hashes: of each, uint64 [n-grams], ascending.
        found: whether it occurs, bool [n-grams].
    """

    tokens: np.ndarray
    hashes: np.ndarray
    found: np.ndarray = field(init=False)

    def __post_init__(self):
        self.found = np.zeros(len(self.hashes), bool)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def look(self, hashes: np.ndarray, places: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which n-grams, not found so far, stand in a text, and where.

        Args:
            hashes: at some places, uint64 [m].
            places: int64 [m].
            text: tokens.
        """
        rows = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        new = np.flatnonzero((self.hashes[rows] == hashes) & ~self.found[rows])
        rows, places = rows[new], places[new]
        same = (text[places[:, None] + np.arange(self.length)] == self.tokens[rows]).all(axis=1)
        return rows[same], places[same]


class _Powers:
    """Of an odd number, and of its inverse, modulo 2^64."""

    def __init__(self, base: int, most: int):
        self.ascending, self.descending = _powers(base, most), _powers(pow(base, -1, 1 << 64), most)

    def sums(self, tokens: np.ndarray) -> np.ndarray:
        """Running sums of t[i] B^i, the first one 0: uint64 [tokens + 1]."""
        sums = np.zeros(len(tokens) + 1, np.uint64)
        terms = tokens.astype(np.uint64)
        np.multiply(terms, self.ascending[: len(tokens)], out=terms)
        np.cumsum(terms, out=sums[1:])
        return sums

    def hashes(self, sums: np.ndarray, places: np.ndarray | slice, length: int) -> np.ndarray:
        """Of the n-grams of some length at these places, uint64."""
        return (sums[length:][places] - sums[: len(sums) - length][places]) * self.descending[places]


def _powers(base: int, most: int) -> np.ndarray:
    factors = np.full(most, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Head:
    """Tables whose n-grams are looked up where their first tokens may stand: where two filters let the hash of those pass."""

    def __init__(self, length: int, tables: list[_Table], powers: _Powers):
        self.length, self.tables = length, tables
        heads = _row_hashes(np.concatenate([table.tokens[:, :length] for table in tables]), powers)
        bits = min((len(heads) - 1).bit_length() + _FILTER_BITS, _MOST_FILTER_BITS)
        self._shift = np.uint64(64 - bits)
        self._filters = np.zeros((2, 1 << bits), bool)
        for passes, hashes in zip(self._filters, (heads, heads * _OTHER), strict=True):
            passes[self._entries(hashes)] = True

    def candidates(self, hashes: np.ndarray) -> np.ndarray:
        """Places of hashes that pass, int64."""
        first, second = self._filters
        places = np.flatnonzero(np.take(first, self._entries(hashes), mode="clip"))
        return places[np.take(second, self._entries(hashes[places] * _OTHER), mode="clip")]

    def _entries(self, hashes: np.ndarray) -> np.ndarray:
        return np.right_shift(hashes, self._shift).view(np.int64)


class _ItemGrams:
    """The n-grams of all items, which are looked for together."""

    def __init__(self, contents: Mapping[str, Sequence[Content]]):
        self._probes = list(contents)
        self._items: list[tuple[str, str]] = []
        self._short: Counter[str] = Counter()
        self._forms: list[tuple[int, int, np.ndarray]] = []  # item, length of n-grams, and which those are
        windows: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for probe, items in contents.items():
            for content in items:
                if len(content.forms[0]) < LEAST_TOKENS:
                    self._short[probe] += 1
                    continue
                for form in content.forms:
                    length = min(len(form), N_GRAM_TOKENS)
                    if length >= LEAST_TOKENS:
                        own = np.lib.stride_tricks.sliding_window_view(np.asarray(form, np.int64), length)
                        windows[length].append((len(self._items), own))
                self._items.append((probe, content.id))
        self.powers, self.tables, numbers = _tables({n: [own for _, own in all_] for n, all_ in windows.items()})
        for length, own in windows.items():
            ends = np.cumsum([len(rows) for _, rows in own])[:-1]
            parts = np.split(numbers[length], ends)
            self._forms += [(item, length, part) for (item, _), part in zip(own, parts, strict=True)]
        self.heads = [
            _Head(head, tables, self.powers)
            for head, tables in (
                (N_GRAM_TOKENS, [t for n, t in self.tables.items() if n == N_GRAM_TOKENS]),
                (LEAST_TOKENS, [t for n, t in self.tables.items() if n < N_GRAM_TOKENS]),
            )
            if tables
        ]

    def overlaps(self) -> dict[str, Overlap]:
        """By probe, from what was found so far."""
        found = {item for item, length, rows in self._forms if self.tables[length].found[rows].mean() >= FOUND_SHARE}
        ids, judged = defaultdict(list), Counter(probe for probe, _ in self._items)
        for item in sorted(found):
            probe, name = self._items[item]
            ids[probe].append(name)
        return {name: Overlap(judged[name], self._short[name], tuple(ids[name])) for name in self._probes}


def _tables(
    windows: Mapping[int, list[np.ndarray]],
) -> tuple[_Powers, dict[int, _Table], dict[int, np.ndarray]]:
    """A table for each length, and for each window the n-gram of it that it is; under hashes that no two n-grams share."""
    rows = {length: np.concatenate(own) for length, own in windows.items()}
    for seed in count():
        draw = np.random.default_rng(seed)
        powers = _Powers(int(draw.integers(1 << 63)) * 2 + 1, CHUNK_TOKENS + N_GRAM_TOKENS)
        tables, numbers = {}, {}
        for length, own in rows.items():
            hashes, first, numbers[length] = np.unique(_row_hashes(own, powers), return_index=True, return_inverse=True)
            tables[length] = _Table(own[first], hashes)
        if all((tables[n].tokens[numbers[n]] == own).all() for n, own in rows.items()):
            return powers, tables, numbers
    raise AssertionError("unreachable")


def _row_hashes(rows: np.ndarray, powers: _Powers) -> np.ndarray:
    """Of n-grams that are the rows, uint64 [rows]."""
    total = np.zeros(len(rows), np.uint64)
    for place in range(rows.shape[1]):
        total += rows[:, place].astype(np.uint64) * powers.ascending[place]
    return total


def _look(grams: _ItemGrams, corpus: IndexedCorpus, span: Span) -> int:
    """Marks the n-grams that begin within a span; its tokens."""
    shard = corpus.shards[span.shard]
    text = shard.ids.read(span.first, min(span.last + N_GRAM_TOKENS - 1, shard.tokens))

    def crosses(places: np.ndarray, length: int) -> np.ndarray:
        """Whether a document begins behind the first token of n-grams and not behind their last."""
        starts = (
            shard.starts_among(span.first + int(places.min()) + 1, span.first + int(places.max()) + length) - span.first
        )
        return np.searchsorted(starts, places, "right") < np.searchsorted(starts, places + length - 1, "right")

    for begin in range(0, span.tokens, CHUNK_TOKENS):
        size = min(CHUNK_TOKENS, span.tokens - begin)
        for table, rows, places in _hits(grams, text[begin : begin + size + N_GRAM_TOKENS - 1], size):
            table.found[rows[~crosses(begin + places, table.length)]] = True
    return span.tokens


def _hits(grams: _ItemGrams, text: np.ndarray, size: int) -> Iterator[tuple[_Table, np.ndarray, np.ndarray]]:
    """Where n-grams that are not found so far stand among the first ``size`` places of a text."""
    sums = grams.powers.sums(text)
    for head in grams.heads:
        last = min(size, len(text) - head.length + 1)
        if last < 1:
            continue
        hashes = grams.powers.hashes(sums, slice(0, last), head.length)
        candidates = head.candidates(hashes)
        for table in head.tables:
            places = candidates[candidates <= len(text) - table.length]
            if len(places):
                known = (
                    hashes[places] if table.length == head.length else grams.powers.hashes(sums, places, table.length)
                )
                rows, places = table.look(known, places, text)
                if len(rows):
                    yield table, rows, places

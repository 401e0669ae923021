"""A shuffled order that is computed, not stored: a keyed permutation of ``range(n)``, O(1) in time and memory.

A Feistel network over just enough bits is a bijection whatever its round function; values that fall outside
``range(n)`` are sent through again until they fall inside (cycle walking, Black and Rogaway, CT-RSA 2002), which
takes fewer than two passes on average because the domain is less than ``2 n``. The round function is the finaliser
of splitmix64 (Steele, Lea, Flood, OOPSLA 2014). This shuffles; it does not hide anything.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache

ROUNDS = 8  # even, so that the halves are back in their places at the end
WORD = (1 << 64) - 1


def order_key(seed: int, source: str, epoch: int) -> int:
    """The key of one pass over one source: 64 bits of SHA-256 over what tells it from all others."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{source}\0{epoch}".encode()).digest()[:8], "little")


def permuted(index: int, n: int, key: int) -> int:
    """Where ``index`` goes in the permutation of ``range(n)`` that ``key`` names.

    Raises IndexError unless ``0 <= index < n``: that is a mistake of the caller, not of a user.
    """
    return _walk(_feistel, index, n, key)


def unpermuted(image: int, n: int, key: int) -> int:
    """The index that ``permuted`` takes to ``image``. Raises IndexError as it does."""
    return _walk(_feistel_back, image, n, key)


def _walk(one_pass: Callable[[int, int, tuple[int, ...]], int], index: int, n: int, key: int) -> int:
    """Passes until the result lies in ``range(n)``."""
    if not 0 <= index < n:
        raise IndexError(f"index {index} is outside range({n})")
    bits = max(2, (n - 1).bit_length())
    rounds = _round_keys(key)
    while True:
        index = one_pass(index, bits, rounds)
        if index < n:
            return index


def _feistel(value: int, bits: int, rounds: tuple[int, ...]) -> int:
    """One pass over ``bits`` bits; with an odd count the halves differ in width and swap it every round."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    for key in rounds:
        high, low = low, high ^ (_mixed(low ^ key) & ((1 << high_bits) - 1))
        high_bits, low_bits = low_bits, high_bits
    return high << low_bits | low


def _feistel_back(value: int, bits: int, rounds: tuple[int, ...]) -> int:
    """``_feistel``, undone."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    for key in reversed(rounds):
        high_bits, low_bits = low_bits, high_bits
        high, low = low ^ (_mixed(high ^ key) & ((1 << high_bits) - 1)), high
    return high << low_bits | low


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mixed((key + (number + 1) * 0x9E3779B97F4A7C15) & WORD) for number in range(ROUNDS))


def _mixed(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)

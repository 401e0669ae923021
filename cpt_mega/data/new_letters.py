"""Characters that some libraries' Unicode tables class and others do not know yet.

Patterns that cut words ask whether a character is a letter or a digit, and each library answers by the tables it was built
with: what one takes for a part of a word is the end of it to another.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

FIRST_NEW, LAST_LETTERS, SYMBOLS = 0x378, 0x34000, range(0x1F000, 0x1FB00)  # code points


def texts_with_new_letters(texts: Sequence[str]) -> list[int]:
    """Indices of the texts that hold one; quick for all the others."""
    others = [index for index, text in enumerate(texts) if not text.isascii()]
    together = np.frombuffer(b"".join([texts[index].encode("utf-16-le") for index in others]), "<u2")
    # most letters come before the first new one, and a look into a table costs more than a comparison
    if not _tables().units[together[together >= FIRST_NEW]].any():
        return []
    return [index for index in others if _tables().letters[_code_points(texts[index])].any()]


def _code_points(text: str) -> np.ndarray:
    """Those of a text that may be new."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.minimum(points[points >= FIRST_NEW], LAST_LETTERS)


class _NewLetters(NamedTuple):
    """Which are new: by code point, up to LAST_LETTERS, which stands for all above; and by UTF-16 unit, where the first of a
    pair stands for 1024 letters."""

    letters: np.ndarray
    units: np.ndarray


@lru_cache
def _tables() -> _NewLetters:
    letters = np.array([is_new(chr(point)) for point in range(LAST_LETTERS + 1)])
    units = letters[: 1 << 16].copy()
    beyond = np.flatnonzero(letters[1 << 16 :])
    units[0xD800 + (beyond >> 10)] = True
    return _NewLetters(letters, units)


def is_new(letter: str) -> bool:
    """Whether a character has no class in Python's own Unicode tables, and may have one in others.

    New symbols are left out: to a pattern they are what characters without a class are.
    """
    return (
        FIRST_NEW <= ord(letter) < LAST_LETTERS and ord(letter) not in SYMBOLS and unicodedata.category(letter) == "Cn"
    )

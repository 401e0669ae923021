"""The patterns by which byte-level tokenizers of known families cut words, and where a text may be cut under all of them."""

import re
from collections.abc import Iterable

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# None of them looks back, none has a match that goes on from an ASCII letter or digit into a blank or a line end, and they look
# ahead behind blanks alone: so a text that is cut there has the words of its parts.
_CUT_BEFORE_BLANKS = {GPT2, LLAMA3, QWEN, TEKKEN}
_BEFORE_A_BLANK = re.compile(r"(?<=[A-Za-z0-9])(?=[ \n])")


def cuts_before_blanks(pattern: str | None, added: Iterable[str]) -> bool:
    """Whether the ids of a text are those of its ``parts``, one behind the other; ``added`` tokens are found in texts."""
    return pattern in _CUT_BEFORE_BLANKS and not any(map(_BEFORE_A_BLANK.search, added))


def parts(text: str) -> list[str]:
    """A text, cut before each blank or line end that follows an ASCII letter or digit; it begins the next part."""
    return _BEFORE_A_BLANK.split(text)

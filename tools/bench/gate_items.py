"""Items that even a tiny model answers: which order of a few words of held-out text is the text's own.

General items of the ready suites are near chance for the quickstart's model, so that nothing could be lost of them. This it can
do (three of four right), and loses with the text it was trained on.
"""

import json
import random
from pathlib import Path

BEFORE_WORDS, WORDS, STRIDE, CHOICES = 8, 6, 4, 4


def write_word_order(texts: Path, items: Path, seed: int = 1) -> int:
    """Items (``question``, ``choices``, ``answer``) from a JSONL of texts; returns how many there are.

    The wrong choices are the right one with two words exchanged.
    """
    generator, found = random.Random(seed), []
    for line in texts.read_text().splitlines():
        words = json.loads(line)["text"].split()
        for place in range(BEFORE_WORDS, len(words) - WORDS, STRIDE):
            choices = _choices(words[place : place + WORDS], generator)
            if len(choices) == CHOICES:
                answer = generator.randrange(CHOICES)
                choices.insert(answer, choices.pop(0))
                before = " ".join(words[place - BEFORE_WORDS : place])
                found.append(
                    {"id": f"order-{len(found):04d}", "question": before, "choices": choices, "answer": answer}
                )
    items.write_text("".join(json.dumps(item) + "\n" for item in found))
    return len(found)


def _choices(words: list[str], generator: random.Random) -> list[str]:
    """The text's own order first; fewer than CHOICES where words repeat so often that there are no others."""
    found = [" ".join(words)]
    swaps = [(i, j) for i in range(len(words)) for j in range(i)]
    for i, j in generator.sample(swaps, len(swaps)):
        other = list(words)
        other[i], other[j] = other[j], other[i]
        if " ".join(other) not in found and len(found) < CHOICES:
            found.append(" ".join(other))
    return found

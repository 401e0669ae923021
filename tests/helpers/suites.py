"""A small suite of every kind of probe, for tests."""

import json
from pathlib import Path

FILES = {
    "choices.jsonl": [
        {"id": f"c{n}", "question": f"What is {n}?", "choices": ["a", "b b", f"{n}"], "answer": n % 3} for n in range(9)
    ],
    "answers.jsonl": [{"id": f"a{n}", "question": f"Who is {n}?", "answer": f"me {n}"} for n in range(5)],
    "pairs.jsonl": [{"id": "p", "first": "It is red.", "second": "Its colour is", "target": "red"}],
    "texts.jsonl": [{"id": f"t{n}", "text": "over the lazy dog " * (n + 1)} for n in range(4)],
}
SUITE = """\
name: small
row_tokens: 64
probes:
  choices: {bucket: general, kind: choice, items: choices.jsonl, shots: 2}
  letters: {bucket: general, kind: choice, items: choices.jsonl, style: letters}
  answers: {bucket: general, kind: answers, items: answers.jsonl}
  lists: {bucket: general, kind: lists, count: 8, shots: 2}
  pairs: {bucket: general, kind: boundaries, items: pairs.jsonl}
  texts: {bucket: domain, kind: perplexity, items: texts.jsonl}
  drift: {bucket: behaviour, kind: drift, items: texts.jsonl, count: 16}
"""


def write_suite(folder: Path, text: str = SUITE) -> Path:
    """Writes the suite, or another text, beside its items; returns the file."""
    for name, lines in FILES.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"

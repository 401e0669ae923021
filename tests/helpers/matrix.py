"""The table of families, models and layouts in the README, written from tests that passed.

``bash tests/run.sh --full tests/engine --write-matrix`` writes it; a test holds it to what the tests enumerate.
"""

import re
from collections import defaultdict
from pathlib import Path

README = Path(__file__).resolve().parent.parent.parent / "README.md"
BEGIN, END = "<!-- matrix: tests/run.sh --full tests/engine --write-matrix -->", "<!-- /matrix -->"
_PARITY = re.compile(r"test_parity\.py::test_logprobs_equal_transformers\[(\w+)-(\w+)\]$")
_TRAINING = re.compile(r"test_training\.py::test_(?!norms)\w+\[(llama|qwen2_tied|qwen3|mistral)-(\w+)\]$")

Cells = dict[tuple[str, str], set[str]]


class Matrix:
    """Collects outcomes of tests by family and layout: which models agreed with transformers, which trained as one."""

    def __init__(self):
        self.scores: Cells = defaultdict(set)
        self.steps: Cells = defaultdict(set)
        self._failed: set[tuple[str, str]] = set()

    def add(self, test: str, passed: bool) -> None:
        """Takes a test's name; one that is of neither kind is passed over."""
        for pattern, cells in ((_PARITY, self.scores), (_TRAINING, self.steps)):
            if found := pattern.search(test):
                model, layout = found.groups()
                layout = layout.replace("one", "tp1")
                cells[model.split("_")[0], layout].add(model if passed else f"{model}: FAILED")

    def table(self) -> str:
        """Markdown: a row a layout, a column a family."""
        cells = [*self.scores, *self.steps]
        families = sorted({family for family, _ in cells})
        layouts = sorted({layout for _, layout in cells}, key=_order)
        lines = [f"| layout | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
        lines += [f"| {_words(x)} | {' | '.join(self._cell(family, x) for family in families)} |" for x in layouts]
        return "\n".join(lines)

    def _cell(self, family: str, layout: str) -> str:
        scores, steps = self.scores.get((family, layout), ()), self.steps.get((family, layout), ())
        if any("FAILED" in name for name in (*scores, *steps)):
            return "FAILED"
        return " ".join(([f"{len(scores)} scored"] if scores else []) + ([f"{len(steps)} trained"] if steps else []))


def written_table() -> str:
    """The table that stands in the README."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def write_table(matrix: Matrix) -> None:
    """Puts the table between its markers."""
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{matrix.table()}\n{END}{rest.partition(END)[2]}")


def _order(layout: str) -> tuple:
    sizes = [int(n) for n in re.findall(r"(?:tp|pp|cp|dp)(\d)", layout)]
    return (len(sizes), sum(sizes), layout)


def _words(layout: str) -> str:
    """``tp2_sp_pp2`` as people write it."""
    names = {
        "one": "1 process",
        "tp1": "1 process",
        "sp": "SP",
        "replicated": "replicated",
        "accumulating": "accumulating",
    }
    parts = [
        names.get(word) or re.sub(r"^(\D+)(\d+)$", lambda m: f"{m[1].upper()} {m[2]}", word)
        for word in layout.split("_")
    ]
    return " ".join(parts)

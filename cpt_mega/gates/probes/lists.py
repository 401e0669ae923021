"""Few-shot tasks on short lists of numbers: what a model can take from its context, in no language.

In-context learning can collapse within the first hundred steps while perplexity stands (arXiv 2506.00288). Each item shows
some lists with their minimum, maximum, median or the parity of their sum, and asks for that of another one; the choices are
the numbers of that list (0 and 1 for a parity), so chance is known.
"""

import random
from collections.abc import Callable, Sequence
from statistics import median_low

from cpt_mega.gates.items import ChoiceItem

TASKS: dict[str, Callable[[Sequence[int]], int]] = {
    "minimum": min,
    "maximum": max,
    "median": median_low,
    "parity": lambda numbers: sum(numbers) % 2,
}
_LARGEST = 99


def list_items(count: int, shots: int, longest: int, seed: int) -> list[ChoiceItem]:
    """``count`` items, of each task in turn; the same for the same arguments."""
    draw = random.Random(seed)
    names = list(TASKS)
    return [
        _item(draw, f"{names[i % len(names)]}-{i:05d}", names[i % len(names)], shots, longest) for i in range(count)
    ]


def _item(draw: random.Random, name: str, task: str, shots: int, longest: int) -> ChoiceItem:
    length = draw.randrange(3, longest + 1, 2) if task == "median" else draw.randint(2, longest)
    shown = [_numbers(draw, length) for _ in range(shots)]
    asked = _numbers(draw, length)
    lines = [f"{_written(numbers)} -> {TASKS[task](numbers)}" for numbers in shown]
    choices = [0, 1] if task == "parity" else asked
    answer = list(choices).index(TASKS[task](asked))
    return ChoiceItem(name, "\n".join([*lines, f"{_written(asked)} ->"]), tuple(map(str, choices)), answer)


def _numbers(draw: random.Random, length: int) -> list[int]:
    return draw.sample(range(_LARGEST + 1), length)  # none twice, so a choice is right or wrong


def _written(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

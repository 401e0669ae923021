"""How documents are shared over context-parallel ranks: every token once, the first chunk with the last."""

import pytest

LENGTHS = [1, 8, 5, 30, 2]


def test_the_order_is_that_of_transformer_engine(workers):
    """Two ranks, a document of eight: the first and the last quarter, and the two in the middle."""
    (parts,) = workers(1).run("context_parts", lengths=[8], size=2)
    assert parts["positions"] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert parts["order"] == [0, 1, 4, 5, 6, 7, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_held_once(workers, size):
    (parts,) = workers(1).run("context_parts", lengths=LENGTHS, size=size)
    assert all(filled % (2 * size if size > 1 else 1) == 0 for filled in parts["filled"])
    assert all(0 <= filled - n < 2 * size for filled, n in zip(parts["filled"], LENGTHS, strict=True))
    assert len({len(held) for held in parts["positions"]}) == 1
    held = [position for rank in parts["positions"] for position in rank]
    assert sorted(p for p in held if p >= 0) == list(range(sum(LENGTHS)))
    restored = [held[place] for place in parts["order"]]
    assert [p for p in restored if p >= 0] == list(range(sum(LENGTHS)))  # gathered, they stand in order again

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.best_fit import OpenRows, best_fit_rows, place_all, stable_order

SIZES = st.lists(st.integers(1, 40), max_size=80).map(lambda sizes: np.array(sorted(sizes, reverse=True), np.int32))


def textbook(sizes, rooms, seq_length):
    """Best fit, item by item; the rooms that are left."""
    rooms = list(rooms)
    for size in sizes:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_length) - size)
    return sorted(rooms)


@given(sizes=SIZES, seq_length=st.integers(40, 60))
def test_it_leaves_the_rooms_that_the_textbook_leaves(sizes, seq_length):
    rows = best_fit_rows(sizes, seq_length)
    taken = np.bincount(rows, weights=sizes)
    assert sorted(seq_length - taken) == textbook(sizes, [], seq_length)
    assert rows.dtype == np.int32 and len(rows) == len(sizes)


@given(sizes=SIZES, rooms=st.lists(st.integers(0, 40), max_size=12))
def test_rows_that_are_there_are_filled_first(sizes, rooms):
    rows = place_all(OpenRows(40, np.array(rooms, np.int64)), sizes)
    taken = np.bincount(rows, weights=sizes, minlength=len(rooms))
    left = np.concatenate([rooms, np.full(len(taken) - len(rooms), 40)]) - taken
    assert sorted(left) == textbook(sizes, rooms, 40)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50) | st.lists(st.integers(0, 3), max_size=50))
def test_the_order_is_stable(keys):
    assert stable_order(np.array(keys, np.int64)).tolist() == sorted(range(len(keys)), key=keys.__getitem__)

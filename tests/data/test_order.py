import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.order import order_key, permuted, unpermuted


@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_it_is_a_bijection(n, key):
    assert sorted(permuted(index, n, key) for index in range(n)) == list(range(n))


@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_large_ranges_stay_in_range_and_distinct(n, key, data):
    indices = data.draw(st.sets(st.integers(0, n - 1), max_size=20))
    images = {permuted(index, n, key) for index in indices}
    assert len(images) == len(indices) and all(0 <= image < n for image in images)


@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_there_is_a_way_back(n, key, data):
    index = data.draw(st.integers(0, n - 1))
    assert unpermuted(permuted(index, n, key), n, key) == index


def test_the_order_is_fixed_for_ever():
    """Runs in flight rely on it: a change here would reorder their data."""
    assert [permuted(index, 10, order_key(1, "wiki", 0)) for index in range(10)] == [9, 3, 2, 0, 6, 7, 5, 4, 1, 8]


def test_keys_differ_by_seed_source_and_epoch():
    keys = {order_key(seed, name, epoch) for seed in (1, 2) for name in ("a", "b") for epoch in (0, 1)}
    assert len(keys) == 8
    orders = {tuple(permuted(index, 50, key) for index in range(50)) for key in keys}
    assert len(orders) == 8


def test_places_are_evenly_spread():
    """Over many keys, the first element lands in each tenth of the range about equally often."""
    counts = [0] * 10
    for epoch in range(2000):
        counts[permuted(0, 1000, order_key(7, "s", epoch)) // 100] += 1
    assert all(140 < count < 260 for count in counts)


@pytest.mark.parametrize("index", [-1, 5])
def test_outside_the_range_is_an_error(index):
    for way in (permuted, unpermuted):
        with pytest.raises(IndexError):
            way(index, 5, 0)

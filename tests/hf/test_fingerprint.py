"""Fingerprints: one for a tensor however it is cut, another for any other values."""

import itertools

import pytest
import torch

from cpt_mega.hf.fingerprint import Fingerprint, added, fingerprint, weights_digest

SHAPE = (3, 40, 24)


@pytest.fixture(scope="module")
def whole():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def _cut(tensor, cuts):
    """Parts of a tensor, cut into equal ones along each axis, with their offsets."""
    sizes = [size // cut for size, cut in zip(tensor.shape, cuts, strict=True)]
    for place in itertools.product(*map(range, cuts)):
        offsets = [p * size for p, size in zip(place, sizes, strict=True)]
        yield tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))], offsets


@pytest.mark.parametrize("cuts", [(1, 1, 1), (3, 1, 1), (1, 4, 1), (1, 1, 3), (3, 2, 4), (1, 40, 24)])
def test_parts_add_up_to_the_whole_however_it_is_cut(whole, cuts):
    parts = [fingerprint(part, offsets, SHAPE) for part, offsets in _cut(whole, cuts)]
    assert len(parts) == cuts[0] * cuts[1] * cuts[2]
    assert sum(parts, Fingerprint()) == fingerprint(whole, (0, 0, 0), SHAPE)


def test_long_runs_and_many_rows_are_hashed_in_pieces_without_a_difference():
    long = torch.randn(2, 70_000)
    halves = [fingerprint(long[:, :35_001], (0, 0), long.shape), fingerprint(long[:, 35_001:], (0, 35_001), long.shape)]
    assert halves[0] + halves[1] == fingerprint(long, (0, 0), long.shape)
    tall = long.reshape(70_000, 2)
    rows = [fingerprint(tall[i : i + 1000], (i, 0), tall.shape) for i in range(0, 70_000, 1000)]
    assert sum(rows, Fingerprint()) == fingerprint(tall, (0, 0), tall.shape)


def test_every_flipped_bit_shows(whole):
    flat = whole.flatten()[:64].clone()
    before = fingerprint(flat, (0,), flat.shape)
    seen = {before}
    for index, bit in itertools.product(range(64), range(32)):
        words = flat.clone().view(torch.int32)
        words[index] ^= -(1 << 31) if bit == 31 else 1 << bit
        seen.add(fingerprint(words.view(torch.float32), (0,), flat.shape))
    assert len(seen) == 1 + 64 * 32


def test_moved_and_exchanged_values_show(whole):
    flat = whole.flatten()
    shifted = flat.roll(1)
    exchanged = flat.clone()
    exchanged[[3, 7]] = exchanged[[7, 3]]
    zeros = torch.zeros_like(flat)
    found = {str(fingerprint(values, (0,), flat.shape)) for values in (flat, shifted, exchanged, zeros, -zeros)}
    assert len(found) == 5


def test_a_value_has_one_name_in_any_precision_that_holds_it(whole):
    half = whole.bfloat16()
    assert fingerprint(half, (0, 0, 0), SHAPE) == fingerprint(half.float(), (0, 0, 0), SHAPE)
    assert fingerprint(half, (0, 0, 0), SHAPE) != fingerprint(whole, (0, 0, 0), SHAPE)


def test_a_scalar_an_empty_shard_and_strided_values(whole):
    assert fingerprint(torch.tensor(2.0), (), ()) == fingerprint(torch.tensor([2.0]), (0,), (1,))
    assert fingerprint(torch.empty(0, 4), (0, 0), (8, 4)) == Fingerprint()
    turned = whole.transpose(0, 2)
    assert fingerprint(turned, (0, 0, 0), turned.shape) == fingerprint(turned.contiguous(), (0, 0, 0), turned.shape)


def test_the_function_is_what_it_was():
    """Names are kept in checkpoints: another function would give every model another name."""
    values = torch.arange(100, dtype=torch.float32).reshape(4, 25) / 7
    assert str(fingerprint(values, (0, 0), (4, 25))) == "d063b7074a7c4d1ee795054f633c6899"


def test_text_and_back():
    one = Fingerprint(1, 2**64 - 1)
    assert Fingerprint.parse(str(one)) == one and len(str(one)) == 32
    with pytest.raises(ValueError, match="no fingerprint"):
        Fingerprint.parse("12")


def test_a_digest_depends_on_names_and_values():
    a, b = Fingerprint(1, 2), Fingerprint(3, 4)
    assert added([{"x": a}, {"x": b, "y": a}]) == {"x": Fingerprint(4, 6), "y": a}
    digests = {weights_digest(value) for value in ({"x": a, "y": b}, {"y": a, "x": b}, {"x": a})}
    assert len(digests) == 3 and weights_digest({"y": b, "x": a}) == weights_digest({"x": a, "y": b})

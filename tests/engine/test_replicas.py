"""Copies that should be bit-equal are found when one bit differs, with rank and parameter."""

import pytest

NORM, FC2 = "decoder.layers.1.input_layernorm.weight", "decoder.layers.0.mlp.linear_fc2.weight"


def _found(workers, jobsite, world: int, overrides: list[str], rank: int | None, name: str = NORM) -> list[str]:
    arguments = {"config": jobsite.config, "overrides": overrides, "rank": rank, "name": name}
    answers = workers(world).run("differing_replicas_after_a_flip", **arguments)
    assert all(answer == answers[0] for answer in answers)  # every rank hears the same
    return answers[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "overrides"), [(2, ["parallel.tp=2"]), (2, []), (2, ["parallel.cp=2"])])
def test_equal_replicas_are_equal(workers, jobsite, world, overrides, precision):
    assert _found(workers, jobsite, world, [*overrides, f"precision={precision}"], None) == []


@pytest.mark.parametrize(
    ("overrides", "name"),
    [([], FC2), (["precision=bf16"], FC2), (["parallel.cp=2"], FC2), (["parallel.tp=2", "parallel.sp=true"], NORM)],
)
def test_one_flipped_bit_is_found(workers, jobsite, overrides, name):
    assert _found(workers, jobsite, 2, overrides, 1, name) == [f"{name} is not the same on ranks 0, 1"]


def test_a_majority_tells_which_rank_is_wrong(workers, jobsite):
    words = ["train.global_batch_size=8", "train.micro_batch_size=1"]
    assert _found(workers, jobsite, 4, words, 2, FC2) == [f"{FC2} on rank 2 is not what it is on 3 other ranks"]


def test_what_tensor_parallelism_cuts_is_not_compared(workers, jobsite):
    assert _found(workers, jobsite, 2, ["parallel.tp=2"], 1, FC2) == []

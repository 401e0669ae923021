"""What is set for CUDA, from the topology alone; and what the table says where there is no GPU."""

import pytest


def _chosen(workers, parallel: dict, deterministic: bool, capability: list[int]) -> dict:
    arguments = {"parallel": parallel, "deterministic": deterministic, "capability": capability}
    (chosen,) = workers(1).run("cuda_environment", **arguments)
    return chosen


@pytest.mark.parametrize(
    ("parallel", "capability", "connections"),
    [
        ({}, [9, 0], None),  # nothing to overlap with a kernel
        ({"tp": 2, "sp": True}, [9, 0], "1"),
        ({"cp": 2}, [9, 0], "1"),
        ({"tp": 2, "sp": True}, [10, 0], None),  # Blackwell has its own queues for communication
    ],
)
def test_connections_follow_the_topology(workers, parallel, capability, connections):
    assert _chosen(workers, parallel, False, capability).get("CUDA_DEVICE_MAX_CONNECTIONS") == connections


def test_determinism_is_asked_of_every_library(workers):
    plain, deterministic = (_chosen(workers, {}, flag, [9, 0]) for flag in (False, True))
    added = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert deterministic == {**plain, **added}


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"])
def test_a_recipe_is_one_that_core_takes(workers, precision):
    """Core's own configuration accepts the fields and keeps them; building it needs no GPU."""
    (fields,) = workers(1).run("recipe_in_core", precision=precision)
    assert fields["bf16"] and fields["fp8"] in ("hybrid", "e4m3")
    assert precision.endswith(fields["fp8_recipe"])

"""What each process of a layout would hold, found by building the model on the meta device among pretended processes."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpt_mega.config import Config
from cpt_mega.engine.mesh import Layout, Mesh, start_groups
from cpt_mega.engine.model import build_chunks
from cpt_mega.engine.precision import model_dtype
from cpt_mega.hf.shape import ModelShape

_GIB = 1024**3


@dataclass(frozen=True)
class RankPlan:
    """One process: its pipeline stage, parameters, and the memory of weights, gradients and optimizer state, in GiB.

    Activations are not counted: they depend on the kernels.
    """

    rank: int
    stage: int
    parameters: int
    state_gib: float


def plan_ranks(config: Config, shape: ModelShape, world: int) -> list[RankPlan]:
    """The first process of each pipeline stage. No process group may exist; no memory is taken and nothing is loaded."""
    per_stage = world // config.parallel.pp
    return [_plan_rank(config, shape, stage * per_stage, world) for stage in range(config.parallel.pp)]


def _plan_rank(config: Config, shape: ModelShape, rank: int, world: int) -> RankPlan:
    with _pretended_mesh(config, rank, world) as mesh, torch.device("meta"):
        chunks = build_chunks(config, shape, mesh)
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return RankPlan(
        rank, mesh.groups.pp.rank(), parameters, parameters * _bytes_per_parameter(config, mesh.dp * mesh.cp) / _GIB
    )


def _bytes_per_parameter(config: Config, peers: int) -> float:
    """Weights and fp32 gradients on each process; master weights and two moments shared by ``peers`` with its part of
    the model (data- and context-parallel ones)."""
    weights, master = (4, 0) if model_dtype(config.precision) == torch.float32 else (2, 4)
    shared = peers if config.train.distributed_optimizer else 1
    return weights + 4 + (master + 8) / shared


@contextmanager
def _pretended_mesh(config: Config, rank: int, world: int):
    """Core's groups over torch's fake backend, as process ``rank`` of ``world`` would see them."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        start_groups(config.parallel)
        model_parallel_cuda_manual_seed(config.train.seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield Mesh(Layout.of(config.parallel, world), rank, world, groups, dist.group.WORLD)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

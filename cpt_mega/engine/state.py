"""What a checkpoint holds of the engine, written and read through ``megatron.core.dist_checkpointing``.

Loading is strict and by name: core itself loads a 512-row embedding into 640 rows without a word, and by default ignores
what a file has and the model has not. So names and global shapes are compared here before anything is read.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError

_RNG_KEY = "rng_state"
_OPTIMIZER_PREFIX = "optimizer."
_COMMON = "common.pt"


def save_engine(engine: Engine, folder: Path) -> None:
    """Writes weights, optimizer state and generators into an empty folder. A collective that returns when all is on disk."""
    engine.gather_parameters()
    if engine.optimizer is not None:
        _make_moments(engine)
    state = _sharded_state(engine, is_loading=False)
    state["rng"] = _sharded_rng(engine.mesh)
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), engine.mesh.groups.dp_cp, True
    )
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)


def load_weights(engine: Engine, folder: Path) -> None:
    """Loads weights alone, into any layout; a bf16 engine's fp32 master weights follow them.

    Raises CheckpointError naming the tensor that is missing, unexpected or misshapen.
    """
    state = _model_states(engine)
    _check_strict(state, folder)
    loaded = _load(state, folder)
    _take_weights(engine, loaded)
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


def load_everything(engine: Engine, folder: Path, same_layout: bool) -> None:
    """Loads weights, master weights and moments bit for bit at any layout; generators when the layout is the same.

    Raises CheckpointError naming the tensor that is missing, unexpected or misshapen.
    """
    _make_moments(engine)
    state = _sharded_state(engine, is_loading=True)
    _check_strict(_model_states(engine), folder)
    if same_layout:
        state["rng"] = _sharded_rng(engine.mesh)
    loaded = _load(state, folder)
    _take_weights(engine, loaded)
    _align_groups(loaded["optimizer"], _optimizers(engine)[0].optimizer.param_groups)
    with torch.no_grad():  # in fp32 the shards are views of leaves that require gradients
        engine.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _take_rng(loaded["rng"])


def _load(state: dict, folder: Path) -> dict:
    try:
        return dist_checkpointing.load(state, str(folder))
    except (FileNotFoundError, AttributeError, CheckpointingException) as error:
        if (folder / _COMMON).exists():
            raise
        # From 0.17 on core keeps plain values elsewhere, which 0.16 meets with an AttributeError.
        fix = (
            f"was written by a newer megatron-core than {core_version}; read it with that one, or export and import it"
        )
        raise CheckpointError("checkpoint", str(folder), fix) from error


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint holds optimizer state."""
    return any(name.startswith(_OPTIMIZER_PREFIX) for name in _stored_shapes(folder))


def _metadata(engine: Engine) -> dict:
    return {
        # The only sharding that any layout can read back; without the key core takes one that it cannot save.
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.mesh.groups.dp_cp,
    }


def _chunk_keys(engine: Engine) -> list[str]:
    count = len(engine.core_chunks)
    return ["model"] if count == 1 else [f"model{i}" for i in range(count)]


def _model_states(engine: Engine) -> dict[str, dict]:
    """Sharded tensors by name, under the key that core's optimizer expects of each chunk.

    From the bare model: under its wrappers the names would get a ``module.`` prefix.
    """
    states = [chunk.sharded_state_dict(metadata=_metadata(engine)) for chunk in engine.core_chunks]
    # Transformer Engine's extra state holds the scales of delayed FP8 scaling, which start anew (the contract says so).
    return {
        key: {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}
        for key, state in zip(_chunk_keys(engine), states, strict=True)
    }


def _sharded_state(engine: Engine, is_loading: bool) -> dict:
    state = _model_states(engine)
    if engine.optimizer is not None:
        with _unpadded_positions(engine):
            state["optimizer"] = engine.optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=_metadata(engine)
            )
    return state


def _align_groups(loaded: object, current: list[dict]) -> None:
    """Gives the stored parameter groups today's settings, in place, and one to each group of today; their step count stays.

    Core tells groups apart by their rates among other things (0.19) or fails on their number, so a changed
    ``optimizer.lr`` or a new ``core.decoupled_lr`` could not be resumed, and changed betas would not take effect.
    """
    if isinstance(loaded, list | tuple):
        for item in loaded:
            _align_groups(item, current)
    if not isinstance(loaded, dict):
        return
    for key, value in loaded.items():
        if key != "param_groups":
            _align_groups(value, current)
    stored = loaded.get("param_groups")
    if stored:
        by_decay = {group.get("wd_mult", group.get("pre_wd_mult")): group for group in stored}
        settings = ("max_lr", "min_lr", "default_config", "is_decoupled_lr", "lr_mult", "betas", "eps")
        loaded["param_groups"] = [
            {**by_decay[group["wd_mult"]], **{name: group[name] for name in settings if name in group}}
            for group in current
        ]


@contextmanager
def _unpadded_positions(engine: Engine) -> Iterator[None]:
    """Mends core's index of parameters while it cuts the optimizer's state into tensors.

    Core gathers the state without the padding between buckets and then cuts it at positions that count the padding
    (distrib_optimizer.py, sharded_param_state_fully_reshardable; its own note there names the bug). With more than one
    bucket - a tied embedding under pipeline parallelism, or overlapped gradient reduction - moments and master weights of
    the parameters behind a padded bucket would be saved shifted, without a word.
    """
    buffers = [buffer for part in _optimizers(engine) for buffer in getattr(part, "buffers", ())]
    kept = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _without_padding(buffer)
    try:
        yield
    finally:
        for buffer, index in zip(buffers, kept, strict=True):
            buffer.param_index_map = index


def _without_padding(buffer) -> dict:
    """Core's ``{parameter: (start, end, bucket)}`` with the padding of earlier buckets taken out."""
    unpadded_starts = itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
    shifts = [bucket.offset - start for bucket, start in zip(buffer.buckets, unpadded_starts, strict=False)]
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _optimizers(engine: Engine) -> list:
    return getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])


def _make_moments(engine: Engine) -> None:
    """Core's sharded optimizer state reads Adam's moments, which do not exist before the first step."""
    for part in _optimizers(engine):
        if not part.optimizer.state and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def _take_weights(engine: Engine, loaded: dict) -> None:
    for key, chunk in zip(_chunk_keys(engine), engine.core_chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError("checkpoint", missing or unexpected, "tensors differ from the model's")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of the tensors of a checkpoint, by name."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _check_strict(model_states: dict, folder: Path) -> None:
    """Raises CheckpointError unless names and global shapes are exactly this model's."""
    expected = _expected_shapes(model_states)
    stored = _stored_shapes(folder)
    for name, shape in expected.items():
        if name not in stored:
            raise CheckpointError("checkpoint", str(folder), f"has no tensor {name}, which the model needs")
        if stored[name] != shape:
            fix = f"tensor {name} has shape {list(stored[name])}, the model's has {list(shape)}"
            raise CheckpointError("checkpoint", str(folder), fix)


def _expected_shapes(model_states: dict) -> dict[str, tuple[int, ...]]:
    """Global shapes that this rank's part of the model reads. Factories (gate and up as one tensor) are expanded."""
    expanded = {key: dict(state) for key, state in model_states.items()}
    apply_factories(expanded)
    tensors = (value for value in nested_values(expanded) if isinstance(value, ShardedTensor))
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def unexpected_tensors(engine: Engine, folder: Path) -> list[str]:
    """Weights in a checkpoint that no rank of this engine reads. A collective: every rank calls it."""
    found = engine.mesh.gather(sorted(_expected_shapes(_model_states(engine))))
    names = engine.mesh.share(sorted({name for part in found for name in part}) if found else None)
    stored = (name for name in _stored_shapes(folder) if not name.startswith((_OPTIMIZER_PREFIX, _RNG_KEY)))
    return sorted(set(stored) - set(names))


def _sharded_rng(mesh: Mesh) -> ShardedObject:
    """This rank's generators, one object for each (pipeline, tensor, data) rank."""
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    groups = mesh.groups
    place = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
    return ShardedObject(_RNG_KEY, state, (mesh.pp, mesh.tp, groups.dp_cp.size()), place, replica_id=0)


def _take_rng(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])

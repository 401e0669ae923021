"""What a checkpoint holds of the engine, written and read through ``megatron.core.dist_checkpointing``.

Loading is strict and by name: core itself loads a 512-row embedding into 640 rows without a word, and by default ignores
what a file has and the model has not. So names and global shapes are compared here before anything is read.
"""

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from cpt_mega.engine.host import CPU
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError, FaultError
from cpt_mega.hf.fingerprint import Fingerprint, added, fingerprint
from cpt_mega.hf.torch_dist import read_index
from cpt_mega.hf.untrusted import COMMON_FILE, EXTRA_STATE, first_refused, only_data, pickled_parts
from cpt_mega.hf.weights import ModelNames

_RNG_KEY = "rng_state"
_OPTIMIZER_PREFIX = "optimizer."


class EngineSave:
    """Weights, optimizer state and generators on their way into an empty folder.

    Made by all ranks together, which stages what is on a GPU; then each rank calls ``write``, at once or in a forked process,
    whose memory stays what it was at the fork; then all ranks call ``finish``.

    The fingerprints are those of the live tensors at that moment: on a GPU they are taken when this is made, in the host's
    memory by ``write``.
    """

    def __init__(self, engine: Engine, folder: Path, names: ModelNames):
        engine.gather_parameters()
        if engine.optimizer is not None:
            _make_moments(engine)
        state = _sharded_state(engine, is_loading=False)
        state["rng"] = _sharded_rng(engine.mesh)
        apply_factories(state)
        _give_own_storage(state)
        self._mesh, self._names, self._live = engine.mesh, names, _own_shards(state)
        self._fingerprints = None if engine.mesh.device == CPU else _fingerprints(self._live, names)
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), engine.mesh.groups.dp_cp, True
        )
        # 0.19 would otherwise look for another library's writer
        options = (
            {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
        )
        self._places: queue.Queue = queue.Queue()
        with _told_to(self._places):
            self._request = dist_checkpointing.save(
                state, str(folder), sharded_strategy=strategy, async_sharded_save=True, **options
            )
        self._buckets = self._request.async_fn_args[1] if self._request.async_fn_args else []
        if self._request.preload_fn is not None:
            self._buckets = self._request.preload_fn()

    def write(self) -> "Written":
        """Writes this rank's files. Raises what the file system raises."""
        taken = self._fingerprints or _fingerprints(self._live, self._names)
        places = {number: self._write_file(number, bucket) for number, bucket in enumerate(self._buckets)}
        return Written(taken, places)

    def finish(self, written: "Written") -> None:
        """Writes the index, when all ranks have written; takes what this rank's ``write`` returned. A collective.

        Raises FaultError, on all ranks, when it could not be written.
        """
        self._places.put(written.places)
        try:
            with _failures_kept() as failures:
                for function in self._request.finalize_fns:
                    function()
        except (CheckpointException, CheckpointingException, OSError) as error:
            raise _not_written(error) from error
        problem = self._mesh.share(failures[0] if failures else None)
        if problem is not None:
            raise _not_written(problem)

    def _write_file(self, number: int, bucket: tuple) -> list:
        """Core's writing of one file, without the further processes that core 0.16 starts: this is one already."""
        transforms, *_ = self._request.async_fn.args
        results, running = queue.Queue(), queue.Queue()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, running, use_fsync=True)
        _, outcome = results.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Written(NamedTuple):
    """What a rank's write returned: its part of the live tensors' fingerprints, by name (those of all ranks add up), and where
    in its files each tensor lies, for core's index."""

    fingerprints: dict[str, Fingerprint]
    places: dict[int, list]


@contextmanager
def _told_to(results: queue.Queue) -> Iterator[None]:
    """Has core expect the places in a queue of this save.

    Its own is one for as long as a process lives, and what a failed save leaves in it is taken for the next one's, whose index
    then points elsewhere; it lies in a server process, which a signal to all processes of a job ends.
    """
    kept, filesystem_async._results_queue = filesystem_async._results_queue, results
    try:
        yield
    finally:
        filesystem_async._results_queue = kept


def _not_written(problem: object) -> FaultError:
    words = " ".join(str(problem).split())[:300]
    return FaultError(f"a checkpoint could not be written ({words}); the one before it is intact")


@contextmanager
def _failures_kept() -> Iterator[list[str]]:
    """Keeps in words what goes wrong where core writes on the main process alone, instead of having it raised there.

    Core lets the other ranks wait in a collective meanwhile: they would wait for as long as their time-out is.
    """
    failures: list[str] = []

    def kept(write: Callable) -> Callable:
        def tried(*arguments, **options):
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                failures.append(str(error))  # the error itself would keep core's process groups

        return tried

    places = ((FileSystemWriterAsync, "finish"), (serialization, "save_config"))
    plain = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, write in plain:
        setattr(owner, name, kept(write))
    try:
        yield failures
    finally:
        for owner, name, write in plain:
            setattr(owner, name, write)


def _give_own_storage(state: dict) -> None:
    """Spares core a copy of everything while the training waits: it clones what lies in a larger buffer, as all weights do, so
    that a buffer is not pickled whole; but nothing is pickled here, and the fork keeps the values."""
    for shard in nested_values(state):
        data = shard.data if isinstance(shard, ShardedTensor) else None
        if data is not None and data.device == CPU and data.is_contiguous() and data.numel():
            flat = data.detach().as_strided((data.numel(),), (1,))  # numpy has no bfloat16, but its bytes
            shard.data = torch.from_numpy(flat.view(torch.uint8).numpy()).view(data.dtype).view(data.shape)


def model_fingerprints(engine: Engine, names: ModelNames) -> dict[str, Fingerprint]:
    """This rank's part of the live weights' fingerprints, by name; those of all ranks add up. No collective."""
    engine.gather_parameters()
    state = _model_states(engine)
    apply_factories(state)
    return _fingerprints(_own_shards(state), names)


class _Shard(NamedTuple):
    """A part of a tensor, with as many axes as the whole."""

    key: str
    values: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]


def _own_shards(state: dict) -> list[_Shard]:
    """The tensors of a state that this rank is the one to answer for; factories must have been applied.

    Core changes its own description of them while it saves.
    """
    found = []
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            values = shard.data.reshape(*[1] * shard.prepend_axis_num, *shard.data.shape)
            found.append(_Shard(shard.key, values, tuple(shard.global_offset), tuple(shard.global_shape)))
    return found


def _fingerprints(shards: Iterable[_Shard], names: ModelNames) -> dict[str, Fingerprint]:
    return added(
        {key: fingerprint(names.unpadded(key, values, offsets), offsets, shape)}
        for key, values, offsets, shape in shards
    )


def load_weights(engine: Engine, folder: Path) -> None:
    """Loads weights alone, into any layout; a bf16 engine's fp32 master weights follow them.

    Raises CheckpointError naming the tensor that is missing, unexpected or misshapen.
    """
    state = _model_states(engine)
    _check_strict(state, folder)
    loaded = _load(state, folder, engine.mesh)
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
    loaded = _load(state, folder, engine.mesh)
    _take_weights(engine, loaded)
    _align_groups(loaded["optimizer"], _optimizers(engine)[0].optimizer.param_groups)
    with torch.no_grad():  # in fp32 the shards are views of leaves that require gradients
        engine.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _take_rng(loaded["rng"])


def _load(state: dict, folder: Path, mesh: Mesh) -> dict:
    _refuse_code(folder, mesh)
    try:
        with only_data():
            return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:  # no Exception: it would pass by all that reports one
        causes = "; ".join(sorted({str(cause).partition("\n")[0] for cause, _ in error.failures.values()}))
        raise CheckpointError("checkpoint", str(folder), f"cannot be loaded ({causes}); name another") from error
    except (FileNotFoundError, AttributeError, CheckpointingException) as error:
        if (folder / COMMON_FILE).exists():
            raise
        # From 0.17 on core keeps plain values elsewhere, which 0.16 meets with an AttributeError.
        fix = (
            f"was written by a newer megatron-core than {core_version}; read it with that one, or export and import it"
        )
        raise CheckpointError("checkpoint", str(folder), fix) from error


def _refuse_code(folder: Path, mesh: Mesh) -> None:
    """Raises CheckpointError, on every rank, naming the file that holds anything but data. The ranks share the reading.

    Core would meet it too, within ``only_data``, but deep in a collective and without a word for the user.
    """
    found = mesh.gather(first_refused(pickled_parts(folder)[mesh.rank :: mesh.world]))
    problem = mesh.share(next(filter(None, found), None) if found else None)
    if problem is not None:
        raise problem


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
        with _unpadded_positions(engine), nullcontext() if is_loading else _ungathered(engine):
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


class _ByPosition(dict):
    """An optimizer's own tensors, by where core looks for them among gathered ones."""

    def __getitem__(self, place: slice) -> torch.Tensor:
        return super().__getitem__(place.start)


@contextmanager
def _ungathered(engine: Engine) -> Iterator[None]:
    """Spares core its copies of the optimizer's state in a data-parallel group of one, while it cuts it into tensors.

    There each tensor is whole already, and core would copy all of them four times over (distrib_optimizer.py,
    get_parameter_state_dp_zero) while the training waits.
    """
    lone = [
        part for part in _optimizers(engine) if hasattr(part, "gbuf_ranges") and part.data_parallel_group.size() == 1
    ]
    for part in lone:
        part.get_parameter_state_dp_zero = partial(_own_state, part)
    try:
        yield
    finally:
        for part in lone:
            del part.get_parameter_state_dp_zero


def _own_state(part, **options) -> dict:
    """What core's ``get_parameter_state_dp_zero`` returns, without a copy. The positions must be those without padding."""
    state: dict = {}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        found: dict[str, _ByPosition] = {}
        for parameter, (start, *_) in buffer.param_index_map.items():
            for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                found.setdefault(name, _ByPosition())[start] = tensor.detach()
        state[number] = dict.fromkeys(ranges, found)
    return state


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
        # Core merges common.pt into what it loads. A module of Transformer Engine would unpickle a state of that name.
        unasked = [name for name in loaded[key] if name.endswith(EXTRA_STATE)]
        if unasked:
            raise CheckpointError("checkpoint", unasked, "is no tensor, and would be unpickled; do not load it")
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise CheckpointError("checkpoint", missing or unexpected, "tensors differ from the model's")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of the tensors of a checkpoint, by name."""
    return {name: tuple(entry.size) for name, entry in read_index(folder).items()}


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

"""What this platform, this model and this layout cannot do together, said before anything is built."""

from collections.abc import Iterator

from cpt_mega.config.schema import Config
from cpt_mega.engine.core_options import check_core_options
from cpt_mega.engine.host import has_gpu
from cpt_mega.engine.mesh import Layout
from cpt_mega.engine.precision import check_precision
from cpt_mega.errors import InputError
from cpt_mega.hf.shape import VOCAB_MULTIPLE, ModelShape

# Core's ways to give pipeline stages different numbers of layers.
_UNEVEN = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}


def check_layout(config: Config, shape: ModelShape, world: int) -> None:
    """Raises InputError for the first thing that cannot be; ``world`` is the number of processes."""
    check_precision(config)
    check_core_options(config.core)
    dp = Layout.of(config.parallel, world).dp
    rules = (*_parallel_rules(config, shape), *_batch_rules(config, shape, dp), *_profile_rules(config, world))
    for wrong, field, value, fix in rules:
        if wrong:
            raise InputError(field, value, fix)


def _parallel_rules(config: Config, shape: ModelShape) -> Iterator[tuple[bool, str, object, str]]:
    p, groups = config.parallel, shape.kv_heads
    yield p.ep > 1, "parallel.ep", p.ep, f"the {shape.family} family has no experts; set it to 1"
    yield (
        p.vpp > 1 and p.pp == 1,
        "parallel.vpp",
        p.vpp,
        "interleaves pipeline stages: set parallel.pp above 1, or it to 1",
    )
    even = not _UNEVEN & config.core.keys()  # core checks those itself
    yield even and shape.layers % p.pp > 0, "parallel.pp", p.pp, f"must divide the model's {shape.layers} layers"
    for name in sorted(_UNEVEN):
        own = config.core.get(name)
        fix = f"must leave a layer to each other stage: the model has {shape.layers}"
        yield own is not None and not 1 <= own <= shape.layers - (p.pp - 1), f"core.{name}", own, fix
    chunks = p.pp * p.vpp
    fix = f"parallel.pp {p.pp} x vpp must divide the model's {shape.layers} layers"
    yield even and shape.layers % chunks > 0, "parallel.vpp", p.vpp, fix
    yield shape.heads % p.tp > 0, "parallel.tp", p.tp, f"must divide the model's {shape.heads} attention heads"
    yield shape.ffn_hidden_size % p.tp > 0, "parallel.tp", p.tp, f"must divide ffn_hidden_size {shape.ffn_hidden_size}"
    yield VOCAB_MULTIPLE % p.tp > 0, "parallel.tp", p.tp, f"must be a power of two up to {VOCAB_MULTIPLE}"
    if has_gpu() and p.cp > 1:
        yield (
            config.precision == "fp32",
            "parallel.cp",
            p.cp,
            "Transformer Engine's context parallelism needs bf16 or FP8",
        )
        heads, key_heads = shape.heads // p.tp, max(1, shape.kv_heads // p.tp)
        fix = (
            f"must divide {heads} query and {key_heads} key/value heads of a rank: the sliding window needs all-to-all"
        )
        odd = shape.sliding_window is not None and (heads % p.cp or key_heads % p.cp)
        yield bool(odd), "parallel.cp", p.cp, fix
    fits = max(groups, p.tp) % min(groups, p.tp) == 0
    yield not fits, "parallel.tp", p.tp, f"must divide, or be a multiple of, the model's {groups} key/value heads"


def _batch_rules(config: Config, shape: ModelShape, dp: int) -> Iterator[tuple[bool, str, object, str]]:
    train, p = config.train, config.parallel
    per_pass = train.micro_batch_size * dp
    yield (
        train.global_batch_size % per_pass > 0,
        "train.global_batch_size",
        train.global_batch_size,
        f"must be a multiple of micro_batch_size {train.micro_batch_size} x {dp} data-parallel replicas",
    )
    rounds = train.global_batch_size // per_pass
    fix = (
        f"an interleaved pipeline takes micro-batches in rounds of parallel.pp {p.pp}, and a step has {rounds} of them"
    )
    yield p.vpp > 1 and rounds % p.pp > 0, "train.global_batch_size", train.global_batch_size, fix
    longest = shape.max_positions
    fix = f"the model has {longest} positions; use rows of at most that many tokens"
    yield train.seq_length > longest, "train.seq_length", train.seq_length, fix


def _profile_rules(config: Config, world: int) -> Iterator[tuple[bool, str, object, str]]:
    profile = config.profile
    fix = "is a snapshot of the CUDA allocator and needs a GPU; leave it out here"
    yield profile.memory and not has_gpu(), "profile.memory", True, fix
    beyond = [rank for rank in profile.ranks if rank >= world]
    fix = f"there are {world} processes; ranks go from 0 to {world - 1}"
    yield profile.start is not None and bool(beyond), "profile.ranks", beyond, fix

"""Which fast ways are taken, chosen from platform and topology; printed at the start, each overridable.

Kernels and overlap are core's own fields (``core.NAME: value`` overrides them); environment variables are set before CUDA
starts, and what the user has set stands.
"""

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from cpt_mega.config.schema import Config, ParallelOptions
from cpt_mega.engine.host import compute_capability, has_gpu
from cpt_mega.engine.precision import is_fp8

_ALLOCATOR, _ALLOCATOR_TOO = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"  # newer torch reads both names
BLACKWELL = (10, 0)


@dataclass(frozen=True)
class FastPath:
    """A line of the table: what, whether it is taken, and the reason or the way to change it."""

    name: str
    on: bool
    why: str


def has_apex() -> bool:
    """Whether NVIDIA apex is here, told by what it contains: the package of that name in the registry is another one."""
    return all(importlib.util.find_spec(name) is not None for name in ("apex", "amp_C"))


def has_fused_weight_gradient() -> bool:
    """Whether apex's kernel that accumulates weight gradients in place is here; core's output layer needs it."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fast_fields(deterministic: bool) -> dict:
    """TransformerConfig's fields for kernels on this platform."""
    gpu = has_gpu()
    return {
        "bias_activation_fusion": True,  # these two on the host as well, see host_kernels
        "apply_rope_fusion": True,
        "masked_softmax_fusion": False,  # attention never goes through core's own softmax
        "cross_entropy_loss_fusion": gpu and not deterministic,  # Megatron-LM refuses the two together
        # Transformer Engine's is faster and asks the host a question each time (torch.equal), which stops the stream.
        "cross_entropy_fusion_impl": "native",
        "gradient_accumulation_fusion": gpu and has_fused_weight_gradient(),
    }


def overlap_fields(config: Config) -> dict:
    """DistributedDataParallelConfig's fields for overlapping communication with computing.

    Only where there is something to overlap with: gloo's reductions take the cores that compute.
    """
    on = has_gpu() and config.train.distributed_optimizer
    return {"overlap_grad_reduce": on, "overlap_param_gather": on}


def environment(
    parallel: ParallelOptions, deterministic: bool, capability: tuple[int, int]
) -> dict[str, tuple[str, str]]:
    """Variables for CUDA, as ``{name: (value, why)}``; pure, so that it can be read and tested anywhere."""
    chosen = {
        _ALLOCATOR: ("expandable_segments:True", "packed rows change the sizes that are asked for"),
        "NCCL_NVLS_ENABLE": ("0", "NVLink SHARP takes memory for buffers; set 1 to try it"),
        "TORCH_NCCL_AVOID_RECORD_STREAMS": ("1", "memory of collectives is given back at once"),
    }
    overlapped = parallel.tp > 1 or parallel.cp > 1
    if overlapped and capability < BLACKWELL:
        why = "tensor- and context-parallel communication must be queued before the kernel it overlaps with"
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = ("1", why)
    if deterministic:
        chosen["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = ("0", "train.deterministic")
        chosen["CUBLAS_WORKSPACE_CONFIG"] = (":4096:8", "train.deterministic")
        chosen["NCCL_ALGO"] = ("Ring", "train.deterministic")
    return chosen


def apply_environment(parallel: ParallelOptions, deterministic: bool) -> None:
    """Sets what the user has not set. Before the first CUDA call; does nothing without a GPU."""
    if has_gpu():
        for name, (value, _) in environment(parallel, deterministic, compute_capability()).items():
            if name != _ALLOCATOR or _ALLOCATOR_TOO not in os.environ:
                os.environ.setdefault(name, value)


def fast_paths(config: Config, core, ddp) -> list[FastPath]:
    """The table of a run; ``core`` and ``ddp`` are the configurations it was built with."""
    return [*_kernels(config, core), *_overlap(core, ddp), *_environment_rows(config)]


def _kernels(config: Config, core) -> list[FastPath]:
    if not has_gpu():
        what = "Transformer Engine's and fused kernels, FP8"
        return [FastPath(what, False, "no GPU: torch's layers, SDPA a document at a time")]
    fp8 = f"{core.fp8_recipe}, {core.fp8}" if is_fp8(config.precision) else f"precision is {config.precision}"
    return [
        FastPath("layers", True, f"Transformer Engine {_version('transformer_engine')}"),
        FastPath("attention within documents", True, "THD kernels over packed rows"),
        FastPath("fused rope", core.apply_rope_fusion, "core.apply_rope_fusion"),
        FastPath("fused SwiGLU", core.bias_activation_fusion, "core.bias_activation_fusion"),
        FastPath("fused cross-entropy", core.cross_entropy_loss_fusion, "core.cross_entropy_loss_fusion"),
        FastPath("weight gradients in place", core.gradient_accumulation_fusion, _apex_words()),
        FastPath("fused Adam", True, "Transformer Engine's, or apex's"),
        FastPath("FP8", is_fp8(config.precision), fp8),
    ]


def _overlap(core, ddp) -> list[FastPath]:
    return [
        FastPath("gradient reduction overlaps", ddp.overlap_grad_reduce, "core.overlap_grad_reduce"),
        FastPath("parameter gathering overlaps", ddp.overlap_param_gather, "core.overlap_param_gather"),
        FastPath("pipeline sends overlap", core.overlap_p2p_comm, "with parallel.vpp above 1"),
        FastPath("tensor-parallel overlap", core.tp_comm_overlap, "core.tp_comm_overlap; needs userbuffers"),
    ]


def _environment_rows(config: Config) -> list[FastPath]:
    if not has_gpu():
        return []
    wanted = environment(config.parallel, config.train.deterministic, compute_capability())
    return [
        FastPath(f"{name}={os.environ.get(name, '')}", os.environ.get(name) == value, why)
        for name, (value, why) in wanted.items()
    ]


def _apex_words() -> str:
    if has_fused_weight_gradient():
        return "apex; core.gradient_accumulation_fusion"
    return "apex is here without its weight-gradient kernel" if has_apex() else "NVIDIA apex is not installed"


def _version(package: str) -> str:
    for name in (package, package.replace("_", "-")):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(version unknown)"

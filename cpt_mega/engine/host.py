"""What megatron-core needs to run without a GPU: the CPU meaning of the CUDA calls it makes.

On a machine with CUDA ``prepare`` does nothing. Elsewhere streams and events are no-ops (host work is already in
order), the CUDA generator is the CPU generator, and kernels are those of ``host_kernels``. Each stand-in is a separate
function object: dynamo's tables are keyed by identity.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch

CPU = torch.device("cpu")

# Tensor factories that core calls with device="cuda" or pin_memory=True.
_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "eye", "linspace", "as_tensor"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
)

_prepared = False


def has_gpu() -> bool:
    """Whether the engine runs on CUDA. Asked of the driver, never of the stand-ins."""
    return torch.cuda.is_available()


def compute_capability(device: int = 0) -> tuple[int, int]:
    """The GPU's compute capability, asked of the driver: torch would start CUDA, which reads its environment only once."""
    driver, device_handle, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device_handle), device)
    found = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device_handle)
        found.append(value.value)
    return found[0], found[1]


def prepare() -> None:
    """Installs the stand-ins once per process, before the first import of any part of megatron.core."""
    global _prepared
    if _prepared or has_gpu():
        return
    _prepared = True
    # Core compiles its fusions while it is imported, so this one must come first.
    torch.compile = _no_compile
    _stand_in_for_device()
    _stand_in_for_streams()
    _stand_in_for_generators()
    _stand_in_for_tensors()
    _stand_in_for_kernels()
    _spare_lone_processes()


def _no_compile(model: Callable | None = None, **options):
    return model if model is not None else (lambda inner: inner)


def _nothing() -> Callable:
    return lambda *args, **kwargs: None


def _stand_in_for_device() -> None:
    cuda = torch.cuda
    # A device and not an index, so that core's device=torch.cuda.current_device() is right as it stands.
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 0
    cuda.set_device, cuda.synchronize, cuda.empty_cache = _nothing(), _nothing(), _nothing()
    cuda.get_device_properties = lambda *args: SimpleNamespace(major=0, minor=0)
    cuda.get_device_capability = lambda *args: (0, 0)
    cuda._lazy_init = _nothing()
    cuda._lazy_call = lambda call, **kwargs: call()


class _HostStream:
    """A stream and an event: host work is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def _same(self, *args, **kwargs):
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _same

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _stand_in_for_streams() -> None:
    cuda, host = torch.cuda, _HostStream()
    cuda.current_stream = lambda *args, **kwargs: host
    cuda.default_stream = lambda *args, **kwargs: host
    cuda.Stream = cuda.Event = _HostStream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


class _OneGenerator(tuple):
    """``torch.cuda.default_generators``: the CPU generator, whatever the index."""

    def __getitem__(self, index):
        return torch.default_generator


def _stand_in_for_generators() -> None:
    cuda = torch.cuda
    cuda.default_generators = _OneGenerator()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    for place in (cuda, cuda.random):
        place.get_rng_state = lambda device=None: torch.get_rng_state()
        place.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _on_host(make: Callable) -> Callable:
    """A tensor factory that takes device="cuda" or pin_memory=True and answers on the host."""

    @functools.wraps(make)
    def factory(*args, **kwargs):
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = CPU  # "meta" and "cpu" stay what they are
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return factory


def _stand_in_for_tensors() -> None:
    # torch.device as a context knows the factories by a table made at its first use, which must hold the real ones:
    # otherwise "with torch.device('meta')" makes real tensors from here on, and transformers loads garbage in silence.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    plain_type = torch.Tensor.type

    def cuda_named_type(self, dtype=None, *args, **kwargs):
        if dtype is None:  # core asks for "torch.cuda.FloatTensor"
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_named_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = _nothing()
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _stand_in_for_kernels() -> None:
    from cpt_mega.engine import host_kernels

    host_kernels.install()


def _spare_lone_processes() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers

    buffers.dist_reduce_scatter_func = _unless_in_place(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _unless_in_place(buffers.dist_all_gather_func)


def _unless_in_place(collective: Callable) -> Callable:
    """Leaves out a collective whose result is its input, as in a group of one: NCCL does nothing then, gloo copies it all."""

    def run(output: torch.Tensor, tensor: torch.Tensor, *args, **kwargs):
        if output.numel() == tensor.numel() and output.data_ptr() == tensor.data_ptr():
            return None
        return collective(output, tensor, *args, **kwargs)

    return run

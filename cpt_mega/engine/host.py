"""What megatron-core needs to run without a GPU: the CPU meaning of the CUDA calls it makes.

On a machine with CUDA ``prepare`` does nothing. Elsewhere streams and events are no-ops (host work is already in
order), the CUDA generator is the CPU generator, and Adam is torch's own functional AdamW under the contract of a fused
Adam (Transformer Engine, ``transformer_engine/pytorch/optimizers/fused_adam.py``), which core's distributed optimizer
expects. Each stand-in is a separate function object: dynamo's tables are keyed by identity.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

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
    _stand_in_for_adam()
    _stand_in_for_clipping()
    _stand_in_for_swiglu()
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


def _stand_in_for_adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = HostAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_TE_OPTIMIZER = HostAdam, True, True


def _stand_in_for_clipping() -> None:
    """Core's own makes a copy of every gradient to scale it."""
    import megatron.core.optimizer.clip_grads as clip_grads

    clip_grads.multi_tensor_scale_impl = _multi_tensor_scale


def _multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list, scale: float) -> None:
    sources, targets = tensor_lists
    if sources is targets:
        torch._foreach_mul_(targets, scale)
        return
    for source, target in zip(sources, targets, strict=True):
        torch.mul(source, scale, out=target)


def _stand_in_for_swiglu() -> None:
    """Core's own is written to be compiled: as it stands it computes the gate's sigmoid three times and joins two halves."""
    import megatron.core.fusions.fused_bias_swiglu as fused

    fused.swiglu, fused.swiglu_back = _swiglu, _swiglu_back


def _swiglu(inputs: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``inputs`` [..., gate and up]."""
    gate, up = inputs.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _swiglu_back(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Its gradient to ``inputs``, bit for bit as autograd has it; each half is written where it belongs."""
    gate, up = inputs.chunk(2, dim=-1)
    result = torch.empty_like(inputs)
    to_gate, to_up = result.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=to_up)
    to_up.mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
    return result


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


class HostAdam(torch.optim.Optimizer):
    """AdamW under a fused Adam's contract: ``step`` in the group, state exactly ``exp_avg`` and ``exp_avg_sq``.

    Plain ``torch.optim.AdamW`` keeps ``step`` in the state, which breaks the distributed optimizer's checkpoints. The
    arithmetic is torch's own functional form, bit for bit. Keyword arguments that only a fused kernel knows
    (``capturable`` in megatron-core 0.19) are accepted and have no meaning here.
    """

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, **gpu_only):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "bias_correction": True}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                self._update(group, params)

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        (adamw if self.adam_w_mode else adam)(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(group["step"] - 1)) for _ in params],  # the functional form adds one itself
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

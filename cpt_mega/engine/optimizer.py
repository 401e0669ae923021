"""Adam through megatron-core, sharded over data-parallel ranks, with fp32 master weights under bf16."""

import math
from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from cpt_mega.config.schema import Config
from cpt_mega.engine.core_options import core_fields


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Core's optimizer over this rank's chunks; no weight decay on norms and biases (core's standard parameter groups)."""
    options = config.optimizer
    core = chunks[0].module.config
    fields = {
        "optimizer": "adam",
        "lr": options.lr,
        "min_lr": config.min_lr,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.beta1,
        "adam_beta2": options.beta2,
        "adam_eps": options.eps,
        "clip_grad": options.clip_norm,
        "bf16": core.bf16,
        "params_dtype": core.params_dtype,
        "fp8_recipe": core.fp8_recipe if core.fp8 else None,
        "use_distributed_optimizer": config.train.distributed_optimizer,
        "overlap_param_gather": chunks[0].ddp_config.overlap_param_gather,
    }
    settings = OptimizerConfig(**{**fields, **core_fields(config.core, OptimizerConfig)})
    # Core's ``grad_scale_func`` stays unset: bf16 and fp32 have no loss scale, and the function would tie the model to the
    # optimizer in a ring that Python's collector does not see: neither they nor their process groups would ever be freed.
    return get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the gradients that the last backward pass left, made ready for an update; infinite where core finds one
    that is not finite. A collective of core's."""
    return math.inf if optimizer.prepare_grads() else float(optimizer.get_grad_norm())


def update(optimizer: MegatronOptimizer, norm: float, most: float) -> None:
    """The update for gradients made ready by ``gradient_norm``; the parts of core's ``ChainedOptimizer.step`` after that.

    Args:
        norm: theirs.
        most: what their norm is scaled down to; ``optimizer.clip_norm`` holds besides.
    """
    for part in optimizer.chained_optimizers:
        clip = part.config.clip_grad
        limit = min(clip, most) if clip > 0 else most
        if math.isfinite(limit) and not part.is_stub_optimizer:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(part.get_parameters(), limit, norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()


def set_learning_rate(optimizer: MegatronOptimizer, config: Config, rate: Callable[[float, float], float]) -> float:
    """Sets this step's rates; what core's OptimizerParamScheduler does, without its state. Returns the default one.

    Args:
        rate: the schedule's value for a peak and a floor. Embedding and output layer have their own with
            ``core.decoupled_lr``. Both come from the configuration: a restored group remembers those of its run.
    """
    default = rate(config.optimizer.lr, config.min_lr)
    settings = optimizer.config
    for group in optimizer.param_groups:
        lr = default
        if not group.get("default_config", True):
            floor = config.min_lr if settings.decoupled_min_lr is None else settings.decoupled_min_lr
            lr = rate(settings.decoupled_lr, min(floor, settings.decoupled_lr))
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.optimizer.weight_decay * group.get("wd_mult", 1.0)
    return default

"""Adam through megatron-core, sharded over data-parallel ranks, with fp32 master weights under bf16."""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from cpt_mega.config.schema import Config


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Core's optimizer over this rank's chunks; no weight decay on norms and biases (core's standard parameter groups)."""
    options = config.optimizer
    core = chunks[0].module.config
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=config.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip_norm,
        bf16=core.bf16,
        params_dtype=core.params_dtype,
        use_distributed_optimizer=config.train.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    core.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Sets this step's rates; what core's OptimizerParamScheduler does, without its state."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

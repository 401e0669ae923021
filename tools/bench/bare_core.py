"""What a step costs without us: a bare training loop over megatron-core, for both benchmarks.

Model, batches and settings come from one JSON file; batches lie in the device's memory, and nothing is logged, saved or looked
at on the way. Of ours are only the stand-ins for a machine without CUDA and the layer spec, so that both sides compute the
same. Runs alone or under torchrun; rank 0 prints one line of JSON last.
"""

import json
import os
import sys
import time
from functools import partial

import torch
import torch.distributed as dist

from cpt_mega.engine.backend import transformer_spec
from cpt_mega.engine.host import has_gpu

# isort: split
# Core comes after the engine, which prepares the host.
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

LLAMA = {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
PLAIN = {"add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "calculate_per_token_loss": True}


def start(tensor_parallel: int) -> None:
    """torch.distributed, core's groups and its generators."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    alone = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if has_gpu() else "gloo", **alone)
    parallel_state.initialize_model_parallel(tensor_parallel, create_gloo_process_groups=False)
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def build(settings: dict) -> tuple:
    """The model under core's data parallelism, and its optimizer; weights of ``checkpoint``, or core's own random ones."""
    bf16 = settings["bf16"]
    dtype = torch.bfloat16 if bf16 else torch.float32
    types = {"bf16": bf16, "params_dtype": dtype}
    host = {"use_cpu_initialization": not has_gpu(), "pipeline_dtype": dtype}
    core = TransformerConfig(**LLAMA, **PLAIN, **types, **host, **settings["core"])
    model = GPTModel(core, transformer_spec(core, None), position_embedding_type="rope", **settings["model"]).cuda()
    if settings["checkpoint"]:
        wanted = {name: part for name, part in model.sharded_state_dict().items() if "_extra_state" not in name}
        model.load_state_dict(dist_checkpointing.load(wanted, settings["checkpoint"]), strict=False)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    chunk = DistributedDataParallel(core, ddp, Float16Module(core, model) if bf16 else model)
    kind = {"optimizer": "adam", "use_distributed_optimizer": True, "fp8_recipe": core.fp8_recipe if core.fp8 else None}
    options = OptimizerConfig(**kind, **types, **settings["optimizer"])
    optimizer = get_megatron_optimizer(options, [chunk], use_gloo_process_groups=False)
    core.finalize_model_grads_func, core.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    return chunk, optimizer


def forward(iterator, model) -> tuple:
    """Core's forward_step_func: a micro-batch is one row of packed documents, as Transformer Engine's attention wants it."""
    batch = next(iterator)
    packed = PackedSeqParams("thd", batch["bounds"], batch["bounds"])
    packed.max_seqlen_q = packed.max_seqlen_kv = batch["longest"]
    losses = model(batch["ids"], None, None, labels=batch["labels"], packed_seq_params=packed)
    return losses, partial(summed, batch["mask"])


def summed(mask, losses) -> tuple:
    total, targets = (losses.float() * mask).sum(), mask.sum()
    return total, targets.to(torch.int), {"loss": torch.stack([total.detach(), targets])}


def step(chunk, optimizer, batches: list[dict]) -> list[dict]:
    """One update; the summed loss and the targets of each micro-batch."""
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sizes = {"num_microbatches": len(batches), "seq_length": batches[0]["ids"].size(1), "micro_batch_size": 1}
    run = get_forward_backward_func()
    found = run(forward_step_func=forward, data_iterator=iter(batches), model=chunk, forward_only=False, **sizes)
    optimizer.step()
    return found


def timed(chunk, optimizer, batches: list[dict], warmup: int, steps: int) -> dict:
    """Milliseconds from the end of each step to the end of the next one; mean losses (nats) of the first step and the last."""
    marks, found = [], []
    for _ in range(warmup + steps):
        found.append(step(chunk, optimizer, batches))
        marks.append(torch.cuda.Event(enable_timing=True) if has_gpu() else time.perf_counter())
        if has_gpu():
            marks[-1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) if has_gpu() else 1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    first, last = (sum(part["loss"] for part in parts).tolist() for parts in (found[0], found[-1]))
    return {"step_ms": times[warmup - 1 :], "first_loss": first[0] / first[1], "last_loss": last[0] / last[1]}


def main(settings: dict) -> None:
    start(settings["core"].get("tensor_model_parallel_size", 1))
    chunk, optimizer = build(settings)
    device, report = torch.device("cuda") if has_gpu() else torch.device("cpu"), {}
    for name, path in settings["batches"].items():
        parts = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in part.items()} for part in torch.load(path)]
        report[name] = timed(chunk, optimizer, parts, settings["warmup"], settings["steps"])
    if dist.get_rank() == 0:
        print(json.dumps({"batches": report, "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream))

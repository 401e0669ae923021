"""Hidden states between the layers, wherever those lie: what tells which layer of a model is not computed as it should be.

Each of them is told by a few dozen numbers, its product with a fixed projection. Stages of the model are numbered: 0 is the
embedding, then one a layer, and the last is the final norm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from cpt_mega.engine.score import UNCOUNTED, GroupedRow, groups_here
from cpt_mega.engine.step import Engine

# Told of a stage, of the number of the micro-batch, and of the hidden states [t, 1, hidden] of this rank's tokens.
Take = Callable[[int, int, Tensor], None]


def hidden_at_targets(engine: Engine, rows: Sequence[GroupedRow], targets: int, projection: Tensor) -> Tensor:
    """Projected hidden states of the tokens before each target. Rows as ``likeliest_of_targets`` takes them.

    Args:
        projection: float32 [hidden, numbers].

    Returns float32 [layers + 2, targets, numbers] on every rank, whatever the layout. A collective.
    """
    mesh, projection = engine.mesh, projection.to(engine.mesh.device)
    found = torch.zeros(engine.shape.layers + 2, targets, projection.size(1), device=mesh.device)
    batch = engine.prepare(len(rows), rows.__getitem__)
    groups_of = groups_here(rows, batch)
    is_cut = engine.core_chunks[0].config.sequence_parallel  # along the sequence, among tensor-parallel ranks

    def take(stage: int, number: int, hidden: Tensor) -> None:
        groups, part = groups_of[number], mesh.groups.tp.rank()
        if is_cut:
            groups = groups[part * hidden.size(0) : (part + 1) * hidden.size(0)]
        elif part:  # its peer has the same
            return
        counted = torch.from_numpy(np.flatnonzero(groups != UNCOUNTED)).to(mesh.device)
        owners = torch.from_numpy(groups).to(mesh.device)[counted]
        found[stage, owners] = hidden[counted, 0].float() @ projection

    with _watching(engine.core_chunks, take):
        engine.forward_logits(batch, lambda *_: None)
    dist.all_reduce(found)  # each number has one owner
    return found.cpu()


@contextmanager
def _watching(chunks: Sequence[GPTModel], take: Take) -> Iterator[None]:
    """Has ``take`` told of every stage that a forward pass comes by on this rank."""
    handles = [handle for chunk in chunks for handle in _watch(chunk, take)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(chunk: GPTModel, take: Take) -> Iterator[torch.utils.hooks.RemovableHandle]:
    begun = 0  # micro-batches: each chunk takes them in their order

    def begin(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal begun
        begun += 1

    def tell(stage: int, module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        take(stage, begun - 1, output[0] if isinstance(output, tuple) else output)

    yield chunk.register_forward_pre_hook(begin)
    if chunk.pre_process:
        yield chunk.embedding.register_forward_hook(partial(tell, 0))
    for layer in chunk.decoder.layers:
        yield layer.register_forward_hook(partial(tell, layer.layer_number))  # core's count begins with 1
    if chunk.decoder.final_layernorm is not None:
        yield chunk.decoder.final_layernorm.register_forward_hook(partial(tell, chunk.config.num_layers + 1))

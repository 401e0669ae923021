"""Whether what must be the same on several processes is the same, bit for bit.

Data- and context-parallel replicas hold equal parameters, and tensor-parallel ranks equal copies of those that are not cut
(norms, some biases). What goes wrong in a gathering, in a reduction, or in memory otherwise stays without a word.

Under the distributed optimizer each rank owns a part of the parameters and the others' copies are gathered from it after
every update: the check finds copies that differ after that (with ``core.overlap_param_gather`` it makes the gathering
first). A bit that flips in the owner's own part is given to all alike, and no comparison can find it.
"""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from cpt_mega.engine.step import Engine

_WEIGHTS = 4093  # a prime: weights 1 to 4093 by position tell a swap, where a plain sum would not
_CHUNK = _WEIGHTS * 1024  # words at once, so that the check takes about 100 MB whatever the parameter


def differing_replicas(engine: Engine) -> list[str]:
    """A sentence for each parameter that differs, naming ranks and parameter. A collective; the same on every rank."""
    engine.gather_parameters()
    groups = engine.mesh.groups
    named = list(_parameters(engine))
    replicated = [(name, p) for name, p in named if not getattr(p, "tensor_model_parallel", False)]
    mine = [*_compare(named, groups.dp_cp), *_compare(replicated, groups.tp)]
    found = engine.mesh.gather(mine)
    return engine.mesh.share(sorted({sentence for part in found for sentence in part}) if found else None)


def checksum(values: Tensor) -> Tensor:
    """int64 scalar that changes with any one bit and with the order of the words of a tensor."""
    width = {2: torch.int16, 4: torch.int32}[values.element_size()]
    words = values.detach().reshape(-1).view(width)
    weights = torch.arange(1, _WEIGHTS + 1, dtype=torch.int64, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        chunk = torch.nn.functional.pad(chunk.long(), (0, -chunk.numel() % _WEIGHTS))
        total += (chunk.view(-1, _WEIGHTS) * weights).sum()
    return total


def _parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for i, chunk in enumerate(engine.core_chunks):
        prefix = f"chunk {i}: " if len(engine.core_chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            yield prefix + name, parameter


def _compare(named: list[tuple[str, Tensor]], group: dist.ProcessGroup) -> Iterator[str]:
    if group.size() == 1 or not named:
        return
    mine = torch.stack([checksum(parameter) for _, parameter in named])
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    for (name, _), sums in zip(named, torch.stack(parts, dim=1).tolist(), strict=True):
        if len(set(sums)) > 1:
            yield _sentence(name, ranks, sums)


def _sentence(name: str, ranks: list[int], sums: list[int]) -> str:
    """Names the ranks that stand against a majority; without one, all."""
    usual, count = Counter(sums).most_common(1)[0]
    if 2 * count <= len(sums):
        return f"{name} is not the same on ranks {', '.join(map(str, ranks))}"
    odd = [rank for rank, value in zip(ranks, sums, strict=True) if value != usual]
    return f"{name} on rank {', '.join(map(str, odd))} is not what it is on {count} other ranks"

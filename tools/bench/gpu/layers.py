"""Section 1: Transformer Engine's layers against torch's on one device, with equal weights."""

from itertools import product

import numpy as np
import small
import torch

from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine

TITLE = "Transformer Engine's layers against torch's"
ROWS, STD = 4, 0.05
# (root mean square of the logits' difference relative to that of the logits, difference of mean losses in nats).
# In fp32 Transformer Engine multiplies in TF32; bf16 rounds to 8 bits after every layer, in an order of its own.
TOLERANCES = {"fp32": (5e-3, 2e-3), "bf16": (5e-2, 1e-2)}


def run(mesh: Mesh, smoke: bool) -> dict:
    """Logits and losses of the same packed rows; the reference is torch's layers in fp32, tolerances are to torch's layers
    in the same precision."""
    scale = small.ON_CPU if smoke else small.ON_GPU
    draw = np.random.default_rng(1)
    rows = [small.random_row(draw, scale.vocab, small.document_lengths(draw, scale.seq_length, 8)) for _ in range(ROWS)]
    table, failed, found = [], [], {}
    for precision, layers in product(TOLERANCES, ("torch", "own")):
        found[precision, layers] = logits, loss = _forward(mesh, scale, precision, layers, rows)
        against_torch = _relative(logits, found[precision, "torch"][0])
        apart = abs(loss - found[precision, "torch"][1])
        most = TOLERANCES[precision]
        if against_torch > most[0] or apart > most[1] or not np.isfinite(loss):
            failed.append(
                f"{precision}, {layers} layers: logits {against_torch:.1e}, loss {apart:.1e} from torch's layers"
            )
        to_fp32 = _relative(logits, found["fp32", "torch"][0])
        required = f"{most[0]:g}, {most[1]:g}"
        table.append(
            [precision, layers, f"{loss:.5f}", f"{against_torch:.1e}", f"{apart:.1e}", required, f"{to_fp32:.1e}"]
        )
    note = "on a CPU the platform's own layers are torch's too: only the code runs" if smoke else ""
    columns = [
        "precision",
        "layers",
        "loss",
        "logits against torch's",
        "loss against torch's",
        "at most",
        "logits to fp32",
    ]
    return {"columns": columns, "rows": table, "failed": failed, "notes": [note] if note else []}


def _forward(mesh: Mesh, scale: small.Scale, precision: str, layers: str, rows: list) -> tuple[torch.Tensor, float]:
    """Logits [tokens, vocabulary] on the host and the mean loss (nats)."""
    config = small.small_config(precision, scale.seq_length)
    engine = small.make_engine(config, scale.shape(), mesh, train=False, layers=layers, std=STD)
    logits = torch.cat(
        engine.forward_logits(engine.prepare_each(rows), lambda output, *_: output.float().squeeze(0).cpu())
    )
    loss, targets = engine.evaluate(len(rows), rows.__getitem__).sum(dim=0).tolist()
    _check_layers(engine, layers)
    return logits, loss / targets


def _check_layers(engine: Engine, layers: str) -> None:
    """That the model is made of what it is said to be made of."""
    names = {type(module).__name__ for module in engine.core_chunks[0].modules()}
    if layers == "torch":
        assert "HostAttention" in names, names


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).square().mean().sqrt() / reference.square().mean().sqrt()).item()

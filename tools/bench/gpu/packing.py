"""Section 3: documents in a packed row against the same documents alone."""

import numpy as np
import small
import torch

from cpt_mega.data.rows import PackedRow
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.score import score_rows
from cpt_mega.engine.step import Engine

TITLE = "packed rows against single documents"
# Largest and mean difference of log-probabilities (nats). Kernels choose their tiles by the number of tokens, so sums round
# differently; fp32 multiplies in TF32 in Transformer Engine's layers.
TOLERANCES = {("torch", "fp32"): (1e-3, 1e-4), ("own", "bf16"): (0.25, 0.02)}
STD = 0.05
CONTROL = (
    10  # the same tokens without boundaries must differ by this many times the mean tolerance, or nothing is tested
)


def run(mesh: Mesh, smoke: bool) -> dict:
    """Log-probabilities of every document's tokens in a packed row and alone, and without boundaries as a control."""
    scale = small.ON_CPU if smoke else small.ON_GPU
    draw = np.random.default_rng(3)
    row = small.random_row(draw, scale.vocab, small.document_lengths(draw, scale.seq_length, 8))
    table, failed = [], []
    for (layers, precision), (most, most_mean) in TOLERANCES.items():
        config = small.small_config(precision, scale.seq_length)
        engine = small.make_engine(config, scale.shape(), mesh, train=False, layers=layers, std=STD)
        worst, mean, control = _differences(engine, row)
        if not (worst <= most and mean <= most_mean):
            failed.append(f"{layers} layers in {precision}: documents differ by {worst:.1e}, {mean:.1e} on average")
        if not control >= CONTROL * most_mean:
            failed.append(
                f"{layers} layers in {precision}: boundaries make too little difference to test: {control:.1e}"
            )
        numbers = (f"{worst:.1e}", f"{mean:.1e}", f"{most:g}, {most_mean:g}", f"{control:.1e}")
        table.append([layers, precision, str(len(row.doc_lengths)), *numbers])
    columns = ["layers", "precision", "documents", "largest", "mean", "at most", "mean without boundaries (control)"]
    return {"columns": columns, "rows": table, "failed": failed, "notes": []}


def _differences(engine: Engine, row: PackedRow) -> tuple[float, float, float]:
    """Largest and mean difference of documents alone, mean difference of the row as one document."""
    packed = _logprobs(engine, row)
    ends = np.cumsum(row.doc_lengths)
    alone = [small.row_of(row.ids[end - n : end], [n]) for n, end in zip(row.doc_lengths, ends, strict=True)]
    single = torch.cat([_logprobs(engine, document) for document in alone])
    whole = _logprobs(engine, PackedRow(row.ids, row.labels, row.loss_mask, [len(row.ids)]))
    real = torch.from_numpy(row.loss_mask) == 1
    apart, control = (single - packed)[real].abs(), (whole - packed)[real].abs()
    return apart.max().item(), apart.mean().item(), control.mean().item()


def _logprobs(engine: Engine, row: PackedRow) -> torch.Tensor:
    """[S] on the host."""
    return score_rows(engine, [row])[0].logprobs.cpu()

"""Section 2: bf16 and every FP8 recipe that the device has learn what fp32 learns."""

import traceback

import numpy as np
import small

from cpt_mega.config.schema import Config
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.precision import check_precision
from cpt_mega.errors import InputError

TITLE = "precisions train like fp32"
# (precision, layers): the first one is the reference.
RUNS = (
    ("fp32", "torch"),
    ("fp32", "own"),
    ("bf16", "own"),
    ("fp8-delayed", "own"),
    ("fp8-tensorwise", "own"),
    ("fp8-blockwise", "own"),
    ("mxfp8", "own"),
)
STEPS, LAST, WARMUP = 200, 20, 20  # the final loss is the mean of the last 20 steps
# Largest gap to the reference's final loss, as a share of it.
GAPS = {"fp32": 0.01, "bf16": 0.02, "fp8-delayed": 0.05, "fp8-tensorwise": 0.05, "fp8-blockwise": 0.05, "mxfp8": 0.05}
ROWS, SUCCESSORS = 8, 4


def run(mesh: Mesh, smoke: bool) -> dict:
    """Trains each from the same weights on the same rows; what the device cannot do is listed with the reason."""
    scale, steps = (small.ON_CPU, 30) if smoke else (small.ON_GPU, STEPS)
    table, failed, notes, reference = [], [], [], None
    for precision, layers in RUNS:
        config = small.small_config(precision, scale.seq_length, rows=ROWS, at_once=ROWS // 2)
        try:
            check_precision(config)
        except InputError as error:
            table.append([precision, layers, f"not run: {error}", "", ""])
            continue
        try:
            losses = _losses(mesh, scale, config, layers, steps)
        except Exception as error:  # one recipe that fails says nothing of the next
            table.append([precision, layers, f"failed: {type(error).__name__}", "", ""])
            failed.append(f"{precision}, {layers} layers: {type(error).__name__}: {error}")
            notes.append(traceback.format_exc())
            continue
        final = float(np.mean(losses[-min(LAST, steps) :]))
        reference = final if reference is None else reference
        gap = final / reference - 1
        if not abs(gap) <= GAPS[precision]:
            failed.append(
                f"{precision}, {layers} layers: final loss {final:.4f} is {gap:+.1%} from fp32's {reference:.4f}"
            )
        table.append([precision, layers, f"{losses[0]:.4f} -> {final:.4f}", f"{gap:+.2%}", f"{GAPS[precision]:.0%}"])
    notes.append(
        f"{steps} steps; a token is followed by one of {SUCCESSORS}, so the least loss is {np.log(SUCCESSORS):.3f} nats"
    )
    columns = ["precision", "layers", "loss", "gap to fp32 with torch's layers", "at most"]
    return {"columns": columns, "rows": table, "failed": failed, "notes": notes}


def _losses(mesh: Mesh, scale: small.Scale, config: Config, layers: str, steps: int) -> list[float]:
    """Loss (nats) of each step."""
    engine = small.make_engine(config, scale.shape(), mesh, train=True, layers=layers)
    table = np.random.default_rng(2).integers(0, scale.vocab, (scale.vocab, SUCCESSORS))
    losses = []
    for step in range(steps):
        rows = _rows(np.random.default_rng(step), table, scale.seq_length)
        batch = engine.prepare(len(rows), rows.__getitem__)
        share = min(1.0, (step + 1) / WARMUP)
        losses.append(engine.train_step(batch, lambda peak, floor, share=share: peak * share).wait().loss)
    del engine
    small.free_memory()
    return losses


def _rows(draw: np.random.Generator, table: np.ndarray, length: int) -> list:
    """Rows whose tokens follow each other by ``table``, in documents of several lengths."""
    ids = np.empty((ROWS, length), np.int64)
    ids[:, 0] = draw.integers(0, len(table), ROWS)
    choices = draw.integers(0, SUCCESSORS, (ROWS, length))
    for at in range(1, length):
        ids[:, at] = table[ids[:, at - 1], choices[:, at]]
    return [small.row_of(row, small.document_lengths(draw, length, 8)) for row in ids]

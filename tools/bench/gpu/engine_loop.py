"""``Engine.train_step`` over fixed batches, as the trainer calls it: what ``throughput.py`` holds against ``bare_core.py``.

``engine_loop.py SETTINGS.json`` prints one line of JSON last, in the form of ``bare_core.py``.
"""

import json
import sys

from cpt_mega.config.load import build_config
from cpt_mega.config.schema import ParallelOptions
from cpt_mega.engine.fast_paths import apply_environment

apply_environment(ParallelOptions(), False)  # before anything starts CUDA

import torch  # noqa: E402

from cpt_mega.data.rows import PackedRow  # noqa: E402
from cpt_mega.engine.mesh import start_mesh, stop_mesh  # noqa: E402
from cpt_mega.engine.precision import check_precision  # noqa: E402
from cpt_mega.engine.step import Engine  # noqa: E402
from cpt_mega.engine.timing import PhaseClock  # noqa: E402
from cpt_mega.hf.shape import ModelShape  # noqa: E402


def main(settings: dict) -> None:
    config, shape = build_config(settings["config"]), ModelShape.from_json(settings["shape"])
    check_precision(config)
    mesh = start_mesh(config.parallel, config.train.seed)
    engine = Engine(config, shape, mesh)  # core's own random weights: on a GPU it draws them when it builds the model
    report = {}
    for name, path in settings["batches"].items():
        rows = [_row(part) for part in torch.load(path)]
        report[name] = timed(engine, rows, settings["warmup"], settings["steps"])
    print(json.dumps({"batches": report, "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)
    stop_mesh()


def timed(engine: Engine, rows: list[PackedRow], warmup: int, steps: int) -> dict:
    """Milliseconds from the end of each step to the end of the next one; a step's numbers are asked for in the next one.

    ``rows`` are those of one batch, which every step has, or of as many as there are steps.
    """
    count = engine.config.train.global_batch_size
    groups = [rows[start : start + count] for start in range(0, len(rows), count)]
    batches = [engine.prepare(count, group.__getitem__) for group in groups]  # the trainer has a thread for this
    clock, losses, pending = PhaseClock(), [], None
    for step in range(warmup + steps):
        launched = engine.train_step(batches[step % len(batches)], lambda peak, floor: peak)
        clock.mark()
        if pending is not None:
            losses.append(pending.wait().loss)
        pending = launched
    losses.append(pending.wait().loss)
    return {
        "step_ms": [1000 * seconds for seconds in clock.seconds()[warmup:]],
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _row(part: dict) -> PackedRow:
    """A micro-batch of one row, as ``bare_core.py`` reads it."""
    ids, labels, mask = (part[name].squeeze(0).numpy() for name in ("ids", "labels", "mask"))
    return PackedRow(ids, labels, mask, part["bounds"].diff().tolist())


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream))

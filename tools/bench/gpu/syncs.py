"""Section 5: a step never waits for the device."""

import time
import traceback
import warnings
from collections import Counter

import numpy as np
import small
import torch

from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.step import Engine, PreparedBatch

TITLE = "no host synchronisation in Engine.train_step"
# Few layers: a launch queue that is full stops the host as well, and that is not what is looked for.
SCALE = small.Scale(hidden=1024, layers=2, vocab=2048, seq_length=1024)
BUSY_CYCLES = 4_000_000_000  # about two seconds of a GPU's clock
WARMUP = 3


def run(mesh: Mesh, smoke: bool) -> dict:
    """A step without clipping (core's reads the norm on the host) under ``torch.cuda.set_sync_debug_mode("error")``.

    Beside the verdict: every place that waits, from a step in mode "warn", and how long the host takes for a step
    behind a device that is kept busy.
    """
    if smoke:
        return {"columns": [], "rows": [], "failed": [], "notes": [], "skipped": "needs CUDA"}
    draw = np.random.default_rng(5)
    rows = [small.random_row(draw, SCALE.vocab, small.document_lengths(draw, SCALE.seq_length, 8)) for _ in range(2)]
    config = small.small_config("bf16", SCALE.seq_length, rows=2, at_once=1, clip_norm=0.0)
    engine = small.make_engine(config, SCALE.shape(), mesh, train=True)
    batch = engine.prepare(len(rows), rows.__getitem__)
    for _ in range(WARMUP):
        _step(engine, batch).wait()
    places = _places_that_wait(engine, batch)
    host_ms, still_busy = _behind_a_busy_device(engine, batch)
    error = _error_under_debug_mode(engine, batch)  # last: a step that is cut off leaves the engine in the middle of it
    table = [
        ["step in mode error", "none" if error is None else error.splitlines()[-1]],
        ["places that wait, in mode warn", str(len(places))],
        ["host time of a step behind a busy device", f"{host_ms:.1f} ms"],
        ["the device was still busy when the step returned", "yes" if still_busy else "no"],
    ]
    notes = [f"{times} x {place}" for place, times in places.most_common()] + ([error] if error else [])
    failed = ([] if error is None else ["a step waits for the device"]) + (
        [] if still_busy else ["the host was held up"]
    )
    return {"columns": ["what", "found"], "rows": table, "failed": failed, "notes": notes}


def _step(engine: Engine, batch: PreparedBatch):
    return engine.train_step(batch, lambda peak, floor: peak)


def _places_that_wait(engine: Engine, batch: PreparedBatch) -> Counter:
    """Where a step in mode "warn" waited, by the innermost lines of our code and of its caller's."""
    places: Counter = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" in str(message):
            frames = traceback.extract_stack()[:-1]
            places[" < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-4:]))] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            pending = _step(engine, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pending.wait()
    return places


def _error_under_debug_mode(engine: Engine, batch: PreparedBatch) -> str | None:
    """The traceback of the first wait, or None."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = _step(engine, batch)
    except RuntimeError:
        return traceback.format_exc()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pending.wait()
    return None


def _behind_a_busy_device(engine: Engine, batch: PreparedBatch) -> tuple[float, bool]:
    """Host milliseconds of a step while the device does something else, and whether it was still at that afterwards.

    Catches waits that the debug mode does not know (those of libraries).
    """
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(BUSY_CYCLES)
    busy.record()
    begin = time.perf_counter()
    pending = _step(engine, batch)
    host_ms, still = 1000 * (time.perf_counter() - begin), not busy.query()
    pending.wait()
    return host_ms, still

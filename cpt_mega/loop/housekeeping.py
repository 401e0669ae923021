"""What a long run does between steps so that all processes stay together: garbage collection, replica checks, time-outs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from cpt_mega.engine.replicas import differing_replicas
from cpt_mega.errors import FaultError
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.trainer import Trainer


@contextmanager
def collected_together(interval_steps: int) -> Iterator[None]:
    """Python's own garbage collection is off meanwhile: one process that stops to collect holds up all the others."""
    was_on = gc.isenabled()
    if interval_steps:
        gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Housekeeping(NullCallback):
    """Collects garbage on all processes at the same steps, shortens the time-outs once the first step is done, and checks
    that replicas are bit-equal."""

    def __init__(self):
        self._is_past_start = False

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """What is due at this step; raises FaultError when replicas differ."""
        train, step = trainer.config.train, trainer.state.step
        if not self._is_past_start:
            trainer.engine.mesh.set_timeout(trainer.config.run.timeout_s)
            self._is_past_start = True
        if train.gc_interval_steps and step % train.gc_interval_steps == 0:
            gc.collect()
        if train.replica_check_steps and step % train.replica_check_steps == 0:
            self._check_replicas(trainer)

    def _check_replicas(self, trainer: Trainer) -> None:
        trainer.settle()
        found = differing_replicas(trainer.engine)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise FaultError(
                f"replicas differ after step {trainer.state.step}: {found[0]}{more}; a device or a reduction is wrong: "
                "look at that rank's host (ranks.json) and start again from the last checkpoint"
            )

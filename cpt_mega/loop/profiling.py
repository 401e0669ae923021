"""``profile.*``: a torch trace of some steps, and a snapshot of the CUDA allocator."""

from pathlib import Path

import torch

from cpt_mega.config.schema import ProfileOptions
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.trainer import Trainer

_EVENTS = 1_000_000  # of the allocator's history; a step of a large model makes some thousand


class Profiling(NullCallback):
    """Traces steps ``start`` to ``end`` on the chosen ranks into ``run.dir/profile``.

    ``rank0_steps3-5.json`` opens in Perfetto or chrome://tracing; ``rank0_steps3-5.memory.pickle`` in pytorch.org/memory_viz.
    """

    def __init__(self, options: ProfileOptions, folder: Path, rank: int, console):
        self.options, self.folder, self.console = options, folder / "profile", console
        self.is_chosen = options.start is not None and rank in options.ranks
        self.first = options.start
        self.last = None if options.start is None else options.end or options.start + 2
        self.rank = rank
        self._profiler: torch.profiler.profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._begin_before(trainer.state.step + 1)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        if self._profiler is not None and trainer.state.step >= self.last:
            trainer.settle()  # the trace ends with what the device did for its last step
            self._finish(trainer.state.step)
        self._begin_before(trainer.state.step + 1)

    def on_end(self, trainer: Trainer) -> None:
        if self._profiler is not None:  # the run ended before the last step that was asked for
            self._finish(trainer.state.step)

    def _begin_before(self, step: int) -> None:
        if not self.is_chosen or step != self.first:
            return
        if self.options.memory:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=self.options.memory)
        self._profiler.start()

    def _finish(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"rank{self.rank}_steps{self.first}-{step}"
        profiler.export_chrome_trace(f"{target}.json")
        if self.options.memory:
            torch.cuda.memory._dump_snapshot(f"{target}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self.console.print(f" profiled steps {self.first} to {step}: {target}.json", style="dim")

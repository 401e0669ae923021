"""Which processes the others wait for: in a synchronous run every step takes as long as its slowest."""

from collections.abc import Sequence
from statistics import fmean, median_low

from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import StepReport, Trainer

SLOW = 1.25  # times what is usual among the processes of a stage
_LEAST_S = 0.005  # differences below say nothing


class Stragglers(NullCallback):
    """Every ``logging.rank_interval_steps`` a line of metrics with each process' own time; on the console who is slow.

    A process' own time is that of reading its rows and of computing until its gradients are ready to be reduced. The processes
    of one replica wait for each other in every layer, so they have nearly the same; replicas wait for each other only then.
    Processes of one pipeline stage are compared, since stages differ by what they hold.
    """

    def __init__(self, folder: RunFolder, console):
        self.folder, self.console = folder, console
        self._own: list[float] = []
        self._wait: list[float] = []

    def on_report(self, trainer: Trainer, report: StepReport) -> None:
        if self._is_on(trainer):
            self._own.append(report.result.own_s)
            self._wait.append(report.data_wait_s)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """Gathers the means since the last time. A collective where it is due."""
        if not self._is_on(trainer) or trainer.state.step % trainer.config.logging.rank_interval_steps:
            return
        trainer.settle()
        mesh = trainer.engine.mesh
        own, wait = (fmean(values) if values else 0.0 for values in (self._own, self._wait))
        self._own, self._wait = [], []
        found = mesh.gather((mesh.groups.pp.rank(), own, wait))
        if found is not None:
            self._tell(trainer.state.step, found)

    def _is_on(self, trainer: Trainer) -> bool:
        return trainer.config.logging.rank_interval_steps is not None and trainer.engine.mesh.world > 1

    def _tell(self, step: int, found: list[tuple[int, float, float]]) -> None:
        stages, own, wait = zip(*found, strict=True)
        slow = slow_ranks(stages, [a + b for a, b in zip(own, wait, strict=True)])
        self.folder.metric({"kind": "ranks", "step": step, "own_s": own, "data_wait_s": wait, "slow": sorted(slow)})
        for rank, times in sorted(slow.items()):
            words = f"rank {rank} takes {times:.1f} times as long as is usual for its stage (ranks.json has its host)"
            self.console.print(f" slow at iteration {step:8d} | {words}", style="yellow")


def slow_ranks(stages: Sequence[int], seconds: Sequence[float]) -> dict[int, float]:
    """The processes that are slow, and how many times the usual they take.

    Args:
        stages: the pipeline stage of each process.
        seconds: what each one took.
    """
    usual = {
        stage: median_low(time for at, time in zip(stages, seconds, strict=True) if at == stage)
        for stage in set(stages)
    }
    return {
        rank: time / usual[stage]
        for rank, (stage, time) in enumerate(zip(stages, seconds, strict=True))
        if time > SLOW * usual[stage] and time - usual[stage] > _LEAST_S
    }

"""What hangs on the loop: the callback that does nothing, logging, and control by signals and files."""

import math
from collections.abc import Sequence
from statistics import fmean

from cpt_mega.errors import FolderLost
from cpt_mega.json_types import finite
from cpt_mega.loop.console import step_line
from cpt_mega.loop.reporters import Reporter
from cpt_mega.loop.run_folder import SAVE, STOP, RunFolder
from cpt_mega.loop.signals import StopRequest
from cpt_mega.loop.trainer import StepReport, Trainer


class NullCallback:
    """Does nothing; callbacks override what they need."""

    def on_start(self, trainer: Trainer) -> None:
        pass

    def on_report(self, trainer: Trainer, report: StepReport) -> None:
        pass

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        pass

    def on_end(self, trainer: Trainer) -> None:
        pass

    def on_fault(self, trainer: Trainer) -> None:
        pass


def end_if_lost(trainer: Trainer, folder: RunFolder, lost: int) -> None:
    """Raises FolderLost when the ranks have agreed that the folder is lost, with what only the main one knows of it."""
    if lost:
        raise FolderLost(folder.path, trainer.engine.mesh.share(folder.lost))


class Logging(NullCallback):
    """A line of metrics a step; a console line, TensorBoard and W&B every log interval. Main process only writes."""

    def __init__(self, folder: RunFolder, reporters: Sequence[Reporter], console):
        self.folder, self.reporters, self.console = folder, reporters, console
        self._since: list[StepReport] = []

    def on_report(self, trainer: Trainer, report: StepReport) -> None:
        if not self.folder.writes:
            return
        self._since.append(report)
        self.folder.metric(self._metric(trainer, report))
        is_last = trainer.ends_here and report.step == trainer.state.step  # before what is said of the end
        if report.step % trainer.config.logging.interval_steps == 0 or is_last:
            self._say(trainer, report)

    def on_end(self, trainer: Trainer) -> None:
        if self._since:  # of steps since the last interval
            self._say(trainer, self._since[-1])
        for reporter in self.reporters:
            reporter.close()

    def _metric(self, trainer: Trainer, report: StepReport) -> dict:
        return {
            "kind": "train",
            "step": report.step,
            "tokens": report.total_tokens,
            "tokens_trained": report.trained_tokens,
            "loss": finite(report.loss),
            "grad_norm": finite(report.result.grad_norm),
            "refused": report.result.refused,
            "lr": report.result.lr,
            "tokens_per_s_device": report.real_tokens / report.seconds / trainer.engine.mesh.world,
            "data_wait_s": report.data_wait_s,
            "forward_backward_s": report.result.forward_backward_s,
            "optimizer_s": report.result.optimizer_s,
            "loss_by_source": {name: finite(loss) for name, loss in report.loss_by_source.items()},
            "tokens_by_source": report.tokens_by_source,
            "epochs_by_source": report.epochs_by_source,
        }

    def _say(self, trainer: Trainer, report: StepReport) -> None:
        window, self._since = self._since, []
        seconds, tokens = sum(r.seconds for r in window), sum(r.real_tokens for r in window)
        rate = tokens / seconds / trainer.engine.mesh.world
        left = trainer.steps_left(report.step, report.total_tokens)
        batch = trainer.config.train.global_batch_size
        self.console.print(
            step_line(
                step=report.step,
                last_step=report.step + left,
                samples=report.step * batch,
                step_ms=1000 * seconds / len(window),
                lr=report.result.lr,
                batch=batch,
                loss=report.loss,
                grad_norm=report.result.grad_norm,
                skipped=sum(r.result.refused for r in window),
                nans=sum(not (math.isfinite(r.loss) and math.isfinite(r.result.grad_norm)) for r in window),
                tokens=report.total_tokens,
                tokens_per_s_device=rate,
                wait_share=sum(r.data_wait_s for r in window) / seconds,
                left_s=left * seconds / len(window),
            )
        )
        values = {
            "lm loss": report.loss,
            "learning-rate": report.result.lr,
            "grad-norm": report.result.grad_norm,
            "batch-size": batch,
            "throughput/device/tokens_per_sec": rate,
            "consumed-tokens": report.total_tokens,
            **{f"timers/{name}": 1000 * seconds for name, seconds in _phases(window).items()},
            **{f"lm loss/{name}": loss for name, loss in report.loss_by_source.items()},
        }
        for reporter in self.reporters:
            reporter.scalars(report.step, values)


def _phases(window: Sequence[StepReport]) -> dict[str, float]:
    """Mean seconds of each phase of a step, under Megatron's names where it has one."""
    return {
        "data-wait": fmean(report.data_wait_s for report in window),
        "forward-backward": fmean(report.result.forward_backward_s for report in window),
        "optimizer": fmean(report.result.optimizer_s for report in window),
    }


class Control(NullCallback):
    """Signals, ``STOP``, ``SAVE`` and a lost folder: all ranks agree at the boundary, in one small reduction a step."""

    def __init__(self, request: StopRequest, folder: RunFolder):
        self.request, self.folder = request, folder

    def ends(self, trainer: Trainer) -> bool:
        """Whether a signal came to any rank, or the folder is lost: then even a look does not go on; ``STOP`` waits for the
        next boundary. A collective; nothing is done about it yet."""
        signalled, _, _, lost = self._asked(trainer)
        return bool(signalled or lost)

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """Stops the run, or asks for a checkpoint, on all ranks when any of them was asked to.

        Raises FolderLost on all of them when the run folder is another run's by now.
        """
        _, _, save, _ = asked = self._asked(trainer)
        trainer.save_requested = bool(save)
        self._end(trainer, asked)
        if save:
            self.folder.answered(SAVE)

    def end(self, trainer: Trainer) -> None:
        """Stops the run as ``on_boundary`` does; what was asked for at this boundary stays asked for."""
        self._end(trainer, self._asked(trainer))

    def _end(self, trainer: Trainer, asked: Sequence[int]) -> None:
        signalled, stop, _, lost = asked
        end_if_lost(trainer, self.folder, lost)
        if stop:
            trainer.stop("preempted", "STOP was touched in the run folder")
            self.folder.answered(STOP)
        elif signalled:
            trainer.stop("preempted", f"received {self.request.name or 'a signal on another rank'}")

    def _asked(self, trainer: Trainer) -> list[int]:
        folder = self.folder
        mine = [self.request.name is not None, folder.asked(STOP), folder.asked(SAVE), folder.lost is not None]
        return trainer.engine.mesh.agree_max([int(asked) for asked in mine])

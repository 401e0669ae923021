"""Weights of sources that are decided during a run."""

from cpt_mega.data.adaptive import adapted_weights
from cpt_mega.gates.looks import crossed
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.trainer import StepReport, Trainer


class AdaptiveWeights(NullCallback):
    """Every interval new shares by the losses since the last decision (``data.adaptive``).

    The main process decides and the others are told, so that no difference in a last bit between ranks can part them.
    What has been seen since the last decision is part of the trainer's state: a continued run decides as an unbroken one.
    """

    def on_report(self, trainer: Trainer, report: StepReport) -> None:
        """Adds a step's mean loss (nats a token) of each source to what has been seen since the last decision."""
        if trainer.config.data.adaptive.interval_tokens is None or report.result.refused:
            return
        for name, loss in report.loss_by_source.items():
            total, steps = trainer.state.source_losses.get(name, (0.0, 0))
            trainer.state.source_losses[name] = [total + loss, steps + 1]

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        """Decides, on all ranks, when a multiple of ``data.adaptive.interval_tokens`` lies in the last step."""
        options, now = trainer.config.data.adaptive, trainer.state.tokens
        if not crossed(now - tokens, now, options.interval_tokens):
            return
        # also when the run ends here: continued or extended, it goes on as if it had not ended
        trainer.settle()
        losses = {name: total / steps for name, (total, steps) in trainer.state.source_losses.items()}
        trainer.state.source_losses = {}
        asked = trainer.stream.asked_shares(now)
        roles = {source.name: source.role for source in trainer.stream.sources if source.name in asked}
        none = dict.fromkeys((source.name for source in trainer.stream.sources if source.name not in asked), 0.0)
        weights = none | adapted_weights(asked, roles, losses, options.strength, options.bound)
        trainer.reweight(trainer.engine.mesh.share(weights), {"by": "data.adaptive", "losses": losses})

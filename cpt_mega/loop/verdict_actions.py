"""What a verdict does to a run: it ends, goes back to a checkpoint that no gate objected to, or comes to an early end.

What a run begins from is such a checkpoint: one that may go back keeps it. All ranks act on the main process' verdict, and
the ledger has its line before anything is done.
"""

from dataclasses import replace

from cpt_mega.errors import RollBack
from cpt_mega.gates.anomaly import AnomalyState
from cpt_mega.gates.selection import passed_steps
from cpt_mega.gates.steering import Steering
from cpt_mega.gates.verdict import ANNEAL, CONTINUE, NOT_JUDGED, ROLL_BACK, STOP, WARN
from cpt_mega.hf.locate import complete_steps
from cpt_mega.loop import rollback
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer


def act(trainer: Trainer, folder: RunFolder, action: str, reason: str) -> None:
    """Does what the strongest verdict asks for, once saves that were begun are complete.

    Raises RollBack, on all ranks, for the run to go on from a checkpoint.
    """
    if action in (NOT_JUDGED, CONTINUE, WARN):
        return
    if not trainer.config.train.tokens or action == STOP:  # nothing is trained: there is nothing to go back to
        _stop(trainer, reason)
    elif action == ROLL_BACK:
        _roll_back(trainer, folder, reason)
    elif action == ANNEAL:
        _anneal(trainer, reason)


def _stop(trainer: Trainer, reason: str) -> None:
    trainer.state.gate_stop = reason
    trainer.stop("gate_stop", reason)


def _roll_back(trainer: Trainer, folder: RunFolder, reason: str) -> None:
    options, state, steering = trainer.config.gates, trainer.state, Steering.from_json(trainer.state.steering)
    passed = passed_steps(state.gate_history)
    steps = [step for step in complete_steps(folder.path) if step in (state.first_step, *passed) and step < state.step]
    target = trainer.engine.mesh.share(max(steps, default=None))
    if target is None or steering.rollbacks >= options.most_rollbacks:
        why = "no checkpoint is left that gates found healthy" if target is None else f"{steering.rollbacks} were made"
        _stop(trainer, f"{reason}; no rollback: {why}")
        return
    steered = replace(steering, rollbacks=steering.rollbacks + 1, lr_scale=steering.lr_scale * options.lr_factor)
    guard = AnomalyState.from_json(state.anomaly)
    what = {"by": rollback.GATES, "lr_scale": guard.lr_scale, "calm_step": guard.calm_step}
    raised = min(1.0, options.replay_step * steered.rollbacks)
    trainer.decide(
        rollback.rollback_line(state, target, reason, **what, steering=steered.to_json(), raised_replay=raised)
    )
    has_replay = any(source.role == "replay" for source in trainer.stream.sources)
    more = f"{raised:.0%} more replay" if has_replay else "and no replay source to raise"
    raise RollBack(f"{reason}: back to step {target}, at {steered.lr_scale:g} of the schedule's learning rate, {more}")


def _anneal(trainer: Trainer, reason: str) -> None:
    state, steering = trainer.state, Steering.from_json(trainer.state.steering)
    if steering.anneal_from is not None or trainer.ends_here:
        return
    asked = trainer.config.gates.anneal_tokens or trainer.learning_rate.decay_tokens
    over = min(asked, trainer.config.train.tokens - state.tokens)
    state.steering = replace(steering, anneal_from=state.tokens, anneal_tokens=over).to_json()
    place = {"step": state.step, "tokens": state.tokens}
    trainer.decide({"kind": "anneal", **place, "anneal_tokens": over, "ends_at": trainer.budget, "reason": reason})

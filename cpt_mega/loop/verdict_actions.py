"""What a verdict does to a run: it ends, goes back to a checkpoint that no gate objected to, or comes to an early end.

All ranks act on the main process' verdict, and the ledger has its line before anything is done.
"""

from dataclasses import replace

from cpt_mega.errors import RollBack
from cpt_mega.gates.steering import Steering
from cpt_mega.gates.verdict import ANNEAL, CONTINUE, ROLL_BACK, STOP, WARN
from cpt_mega.hf.locate import complete_steps
from cpt_mega.loop import rollback
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer

DECAY_SHARE = 0.1  # of the run, in which an annealed one ends where nothing else is asked for


def act(trainer: Trainer, folder: RunFolder, action: str, reason: str) -> None:
    """Does what the strongest verdict asks for, once saves that were begun are complete.

    Raises RollBack, on all ranks, for the run to go on from a checkpoint.
    """
    if action in (CONTINUE, WARN):
        return
    if not trainer.config.train.tokens or action == STOP:  # nothing is trained: there is nothing to go back to
        _stop(trainer, reason)
    elif action == ROLL_BACK:
        _roll_back(trainer, folder, reason)
    elif action == ANNEAL:
        _anneal(trainer, reason)


def raised_replay(shares: dict[str, float], roles: dict[str, str], step: float) -> dict[str, float]:
    """Shares of sources with that of replay raised by ``step``, 90 % at most, the others giving way in proportion.

    The same shares where there is no replay, or nothing else.
    """
    replay = sum(share for name, share in shares.items() if roles[name] == "replay")
    total = sum(shares.values())
    if not 0 < replay < total:
        return dict(shares)
    wanted = max(replay / total, min(0.9, replay / total + step))
    up, down = wanted * total / replay, (1 - wanted) * total / (total - replay)
    return {name: share * (up if roles[name] == "replay" else down) for name, share in shares.items()}


def _stop(trainer: Trainer, reason: str) -> None:
    trainer.state.gate_stop = reason
    trainer.stop("gate_stop", reason)


def _roll_back(trainer: Trainer, folder: RunFolder, reason: str) -> None:
    options, state, steering = trainer.config.gates, trainer.state, Steering.from_json(trainer.state.steering)
    healthy = {look["step"] for look in state.gate_history if look["action"] == CONTINUE}
    steps = [step for step in complete_steps(folder.path) if step in healthy and step < state.step]
    target = trainer.engine.mesh.share(max(steps, default=None))
    if target is None or steering.rollbacks >= options.most_rollbacks:
        why = "no checkpoint is left that gates found healthy" if target is None else f"{steering.rollbacks} were made"
        _stop(trainer, f"{reason}; no rollback: {why}")
        return
    steered = replace(steering, rollbacks=steering.rollbacks + 1, lr_scale=steering.lr_scale * options.lr_factor)
    before = rollback.weights(trainer.stream, state.tokens)
    after = raised_replay(before, {source.name: source.role for source in trainer.stream.sources}, options.replay_step)
    what = {"lr_scale": 1.0, "calm_step": state.step, "steering": steered.to_json()}
    if after != before or steering.rollbacks:  # an earlier one's stay
        what["weights"] = after
    trainer.decide(rollback.rollback_line(state, target, reason, **what))
    raise RollBack(f"{reason}: back to step {target}, at {steered.lr_scale:g} of the schedule's learning rate")


def _anneal(trainer: Trainer, reason: str) -> None:
    state, steering = trainer.state, Steering.from_json(trainer.state.steering)
    if steering.anneal_from is not None or trainer.ends_here:
        return
    over = trainer.config.gates.anneal_tokens or max(1, int(DECAY_SHARE * trainer.config.train.tokens))
    state.steering = replace(steering, anneal_from=state.tokens, anneal_tokens=over).to_json()
    place = {"step": state.step, "tokens": state.tokens}
    trainer.decide({"kind": "anneal", **place, "anneal_tokens": over, "ends_at": trainer.budget, "reason": reason})

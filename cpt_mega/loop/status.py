"""``status.json`` during the loop, and the command to type next."""

import shlex

from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.gates.selection import objected_steps
from cpt_mega.loop.callbacks import NullCallback
from cpt_mega.loop.run_folder import LEDGER, METRICS, RunFolder
from cpt_mega.loop.trainer import Trainer


class Status(NullCallback):
    """Keeps ``status.json`` at the step the run has come to, once a log interval.

    Args:
        folder, state: the run's.
        command: what starts this run again.
        exports: whether the run leaves an HF checkpoint itself.
    """

    def __init__(self, folder: RunFolder, state: TrainerState, command: str, exports: bool):
        self.folder, self.state, self.command, self.exports = folder, state, command, exports

    def write(self, state: str, reason: str) -> None:
        """Writes a state under its name, with its exit code and the next command."""
        place = (self.state.step, self.state.tokens, self.state.run_id)
        self.folder.status(state, reason, *place, self.next_command(state))

    def next_command(self, state: str) -> str:
        """What a user would type next, from the checkout."""
        run, export = (shlex.quote(str(path)) for path in (self.folder.path, self.folder.path / "export"))
        if state == "finished" and self.exports:
            return f"python -m cpt_mega.score --checkpoint {export} --input ROWS.jsonl --output SCORES.jsonl"
        if state == "finished" and not self.state.step:  # only looked at
            return f"tail -n 5 {shlex.quote(str(self.folder.path / METRICS))}"
        choice = f"python tools/select_checkpoint.py {run}"
        if state == "finished" and self._ended_badly:
            return choice
        if state == "finished":
            return f"python tools/export_hf.py --checkpoint {run} --output {export}"
        if state == "preempted":  # what was accepted stands in the checkpoint now, and is no licence for other changes
            return self.command.partition(" --accept ")[0]
        if state != "gate_stop":
            return self.command
        ledger = shlex.quote(str(self.folder.path / LEDGER))
        # without a look of its own, as where the guard of steps stopped it, there is nothing to choose by
        return choice if self.state.gate_history else f"tail -n 3 {ledger}"

    @property
    def _ended_badly(self) -> bool:
        """Whether the last look found harm, of which a gate only warned."""
        return bool(objected_steps(self.state.gate_history[-1:]))

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        if trainer.state.step % trainer.config.logging.interval_steps == 0:
            self.write("running", "")

"""When a run is saved, and what becomes of its older checkpoints."""

import time
from pathlib import Path

from cpt_mega.checkpoint.retention import PERMANENT, PINNED, ROLLING, START, trim
from cpt_mega.checkpoint.saving import CheckpointSave, remove_unfinished
from cpt_mega.errors import FaultError, SaveStalled
from cpt_mega.gates.anomaly import AnomalyState, rollback_target
from cpt_mega.gates.looks import crossed, ends_stable_phase
from cpt_mega.gates.selection import steps_to_keep
from cpt_mega.hf.locate import complete_steps
from cpt_mega.hf.model_info import copy_model_files
from cpt_mega.hf.weights import ModelNames
from cpt_mega.loop.callbacks import NullCallback, end_if_lost
from cpt_mega.loop.run_folder import RunFolder
from cpt_mega.loop.trainer import Trainer

MODEL_FILES = "model"  # of the run folder


class Checkpoints(NullCallback):
    """A checkpoint at intervals, at each look of the gates, on demand (``SAVE``), at the end of whatever kind, and at the start
    where gates may go back to it.

    At most one is on its way: the next waits for it. Where it is asked for they are written beside the training, and the
    loop is held for what must not change meanwhile; ``close`` ends what is left when a process failed alone.

    Args:
        model_files: where ``model.json`` and ``hf/`` come from; copied at the start, as that checkpoint may not stay.
        saved: the step that the run goes on from, if its checkpoint lies in this folder.
        keeps_start: whether a run begins with a checkpoint of what it starts from, for gates to go back to.
    """

    def __init__(
        self,
        model_files: Path,
        names: ModelNames,
        folder: RunFolder,
        console,
        saved: int | None,
        keeps_start: bool = False,
    ):
        self.model_files, self.names, self.folder, self.console = model_files, names, folder, console
        self._saved, self._keeps_start = saved, keeps_start
        self._on_its_way: CheckpointSave | None = None
        self._begun = self._held = 0.0
        self._clock = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        """Copies the model's files, removes what killed runs left, and saves what the run begins from where that is to be kept.

        A collective; raises FaultError as ``CheckpointSave`` does.
        """
        if self.folder.writes:
            (self.folder.path / MODEL_FILES).mkdir(exist_ok=True)
            copy_model_files(self.model_files, self.folder.path / MODEL_FILES)
            for name in remove_unfinished(self.folder.path):
                self.console.print(f" removed {name}, which was never finished", style="dim")
        self.model_files = self.folder.path / MODEL_FILES
        begins = self._saved is None and trainer.outcome is None and not trainer.ends_here
        if self._keeps_start and begins:
            self._save(trainer, START, waits=True)  # nothing goes on yet that a save beside it would gain from

    def on_boundary(self, trainer: Trainer, tokens: int) -> None:
        self._advance(trainer, wait=False)
        kind = self._due(trainer, tokens)
        if kind is not None:
            self._save(trainer, kind)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.state.step:
            self._save(trainer, PERMANENT if trainer.outcome[0] == "finished" else ROLLING)
            self._advance(trainer, wait=True)

    def on_fault(self, trainer: Trainer) -> None:
        try:
            self._advance(trainer, wait=True, again=False)
        except FaultError as error:  # what went wrong first ends the run
            self.console.print(f" {error}", style="yellow")

    def close(self) -> None:
        """Ends what is still on its way."""
        if self._on_its_way is not None:
            self._on_its_way.abandon()

    def _due(self, trainer: Trainer, tokens: int) -> str | None:
        """The kind of checkpoint that this boundary wants, the one that stays longest; None for none."""
        config, now = trainer.config, trainer.state.tokens
        if trainer.save_requested:
            return PINNED
        if trainer.ends_here or crossed(now - tokens, now, config.checkpoint.interval_tokens):
            return PERMANENT
        if ends_stable_phase(config, now - tokens, now):
            return PINNED
        looked = trainer.state.judged_step == trainer.state.step
        rolling = crossed(now - tokens, now, config.checkpoint.rolling_interval_tokens)
        return ROLLING if looked or rolling or self._minutes_are_up(trainer) else None

    def _minutes_are_up(self, trainer: Trainer) -> bool:
        minutes = trainer.config.checkpoint.rolling_interval_minutes
        if minutes is None:
            return False
        up = time.monotonic() - self._clock >= 60 * minutes
        return bool(trainer.engine.mesh.agree_max([int(up and self.folder.writes)])[0])

    def _save(self, trainer: Trainer, kind: str, waits: bool = False) -> None:
        if self._saved == trainer.state.step:
            return
        self._advance(trainer, wait=True)
        trainer.quiesce()
        self.folder.renew_claim()  # a process that was halted may have lost the folder long ago and not know it yet
        end_if_lost(trainer, self.folder, *trainer.engine.mesh.agree_max([int(self.folder.lost is not None)]))
        _check_corpora(trainer)
        self._clock = time.monotonic()
        waits = waits or trainer.outcome is not None or not trainer.config.checkpoint.asynchronous
        self._begin(trainer, kind, waits)
        if waits:
            self._advance(trainer, wait=True)

    def _begin(self, trainer: Trainer, kind: str, waits: bool) -> None:
        self._begun = time.monotonic()
        state = trainer.state
        state.kind = kind
        self._on_its_way = CheckpointSave(self.folder.path, trainer.engine, state, self.model_files, self.names, waits)
        self._held = time.monotonic() - self._begun
        self._saved = state.step

    def _advance(self, trainer: Trainer, wait: bool, again: bool = True) -> None:
        """Takes what is on its way as far as it has come, or to its end; begins ``again`` what came to a standstill."""
        begin = time.monotonic()
        while (save := self._on_its_way) is not None and (wait or save.is_ready()):
            trainer.quiesce()  # it forks; and should the last step turn out bad, ``on_fault`` brings the save to its end
            try:
                path = save.proceed()
            except SaveStalled as stalled:
                if not again:
                    raise
                self.console.print(f" {stalled}; step {trainer.state.step} is saved in its place", style="yellow")
                self._begin(trainer, save.kind, waits=True)  # without a fork, which is what can stand still
                self._advance(trainer, wait=True)
                return
            if path is not None:
                self._on_its_way = None
                self._held += time.monotonic() - begin
                if self.folder.writes:
                    self._tell(path, save)
                    self._trim(trainer, save.step)
                return
        self._held += time.monotonic() - begin

    def _tell(self, path: Path, save: CheckpointSave) -> None:
        seconds, size = time.monotonic() - self._begun, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        self.folder.metric(
            {
                "kind": "checkpoint",
                "class": save.kind,
                "step": save.step,
                "bytes": size,
                "seconds": seconds,
                "held_s": self._held,
            }
        )
        self.console.print(
            f" saved {path} ({save.kind}) in {seconds:.1f} s, the run was held {self._held:.2f} s", style="dim"
        )

    def _trim(self, trainer: Trainer, newest: int) -> None:
        history, options = trainer.state.gate_history, trainer.config.checkpoint
        there = complete_steps(self.folder.path)
        kept = steps_to_keep(history, there, trainer.state.first_step) | {_to_go_back_to(trainer, there)} - {None}
        for name in trim(self.folder.path, newest, options.keep_rolling, options.keep_permanent, kept):
            self.console.print(f" removed {name}: it need not stay any longer", style="dim")


def _to_go_back_to(trainer: Trainer, there: list[int]) -> int | None:
    """The checkpoint that a rollback would take, as long as one may come."""
    known = AnomalyState.from_json(trainer.state.anomaly)
    return rollback_target(known, trainer.config.anomaly, there) if known.alarms else None


def _check_corpora(trainer: Trainer) -> None:
    """Raises FaultError, on all ranks, when a corpus has changed under the run: of what is saved, its data state would be of
    other documents, or its weights have seen them. A collective."""
    problem, mesh = None, trainer.engine.mesh
    if mesh.is_main and trainer.stream is not None:
        try:
            trainer.stream.check_corpora()
        except FaultError as error:
            problem = str(error)
    problem = mesh.share(problem)
    if problem is not None:
        raise FaultError(problem)

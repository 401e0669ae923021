"""Where metrics go besides ``metrics.jsonl``: TensorBoard and Weights & Biases, under Megatron's names.

Each reporter takes ``scalars(step, {name: value})`` and ``close()``. Imports are made where they are used: both
libraries are slow to import.
"""

import os
from pathlib import Path
from typing import Protocol

from cpt_mega.config import Config


class Reporter(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``run.dir/tensorboard``; after a restart, steps from ``step`` on replace the old ones."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that continues under the run's own id; ``offline`` needs neither account nor network."""

    def __init__(self, config: Config, run_dir: Path, run_id: str):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            mode=config.logging.wandb,
            project=config.logging.wandb_project,
            dir=str(run_dir),
            id=run_id,
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", disable_git=True, x_disable_stats=True),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def open_reporters(config: Config, run_dir: Path, run_id: str, step: int) -> list[Reporter]:
    """The reporters that the configuration asks for; main process only."""
    reporters: list[Reporter] = []
    if config.logging.tensorboard:
        reporters.append(TensorBoard(run_dir, step))
    if config.logging.wandb != "off":
        reporters.append(WeightsAndBiases(config, run_dir, run_id))
    return reporters

"""A run's own numbers for ``gates/diagnosis.py``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from cpt_mega.config.schedule import LearningRate
from cpt_mega.data.chat import has_template
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.anomaly import AnomalyState
from cpt_mega.gates.diagnosis import Evidence
from cpt_mega.gates.selection import healthy_steps
from cpt_mega.gates.steering import Steering
from cpt_mega.gates.suite import Found
from cpt_mega.hf.locate import complete_steps
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop.run_folder import LEDGER, read_lines
from cpt_mega.loop.trainer import Trainer


def evidence(trainer: Trainer, found: Sequence[Found], run_dir: Path, origin: Path) -> Evidence:
    """Of a run at a look; ``origin`` is the checkpoint that it started from. Reads the run folder: for the main process."""
    config, state, stream = trainer.config, trainer.state, trainer.stream
    steering, known = Steering.from_json(state.steering), AnomalyState.from_json(state.anomaly)
    sources = [] if stream is None else stream.sources
    statistics = {source.name: source.plan.statistics for source in sources}
    left = set(complete_steps(run_dir))
    checks = config.data.row_checks.action != "off"
    odd = sum(line.get("kind") == "odd_row" for line in read_lines(run_dir / LEDGER)) if checks else None
    return Evidence(
        peak_lr=config.optimizer.lr * steering.lr_scale * known.lr_scale,
        warmup_share=LearningRate.from_config(config).warmup_tokens / max(1, config.train.tokens),
        has_template=_has_template(origin),
        replay_share=_replay_share({source.name: source.role for source in sources}, state.stream.get("sources", {})),
        passes={} if stream is None else stream.epochs,
        odd_rows=odd,
        fill={name: of.fill for name, of in statistics.items()},
        split={name: of.split_documents / max(1, of.documents) for name, of in statistics.items()},
        grad_norm=known.norms[-1] if known.norms else None,
        usual_norm=median(known.norms) if known.norms else None,
        refused=sum(line.get("action") == "skip" for line in read_lines(run_dir / LEDGER)),
        kl={one.probe.name: one.readings[0].value for one in found if one.readings[0].metric == "kl"},
        healthy_step=max((step for step in healthy_steps(state.gate_history) if step in left), default=None),
        run_dir=str(run_dir),
        tokens=state.tokens,
        budget=config.train.tokens,
    )


def _replay_share(roles: Mapping[str, str], sources: Mapping[str, Mapping]) -> float | None:
    tokens = {name: sources[name]["tokens"] for name in roles if name in sources}
    replay = sum(count for name, count in tokens.items() if roles[name] == "replay")
    return replay / max(1, sum(tokens.values())) if "replay" in roles.values() else None


def _has_template(origin: Path) -> bool:
    try:
        return has_template(TextTokenizer.load(origin / HF_FOLDER))
    except InputError:  # a model that was imported without one
        return False

"""A run's own numbers for ``gates/diagnosis.py``."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from cpt_mega.config.schedule import LearningRate
from cpt_mega.data.chat import has_template
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.anomaly import SKIP, AnomalyState
from cpt_mega.gates.diagnosis import Evidence
from cpt_mega.gates.selection import passed_steps
from cpt_mega.gates.steering import Steering
from cpt_mega.gates.suite import Found
from cpt_mega.hf.locate import complete_steps
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop import guarding
from cpt_mega.loop.checkpoints import MODEL_FILES
from cpt_mega.loop.run_folder import LEDGER, each_line
from cpt_mega.loop.trainer import Trainer


def evidence(trainer: Trainer, found: Sequence[Found], run_dir: Path, origin: Path) -> Evidence:
    """Of a run at a look; ``origin`` is the checkpoint that it started from. Reads the run folder: for the main process."""
    config, state, stream = trainer.config, trainer.state, trainer.stream
    steering, known = Steering.from_json(state.steering), AnomalyState.from_json(state.anomaly)
    sources = [] if stream is None else stream.sources
    statistics = {source.name: source.plan.statistics for source in sources}
    left = set(complete_steps(run_dir))
    checks = config.data.row_checks.action != "off"
    odd_rows, refused = found_and_refused(each_line(run_dir / LEDGER))
    return Evidence(
        peak_lr=config.optimizer.lr * steering.lr_scale * known.lr_scale,
        warmup_share=LearningRate.from_config(config).warmup_tokens / max(1, config.train.tokens),
        has_template=has_template_of(run_dir, origin),
        replay_share=_replay_share({source.name: source.role for source in sources}, state.stream.get("sources", {})),
        passes={} if stream is None else stream.epochs,
        odd_rows=odd_rows if checks else None,
        fill={name: of.fill for name, of in statistics.items()},
        split={name: of.split_documents / max(1, of.documents) for name, of in statistics.items()},
        grad_norm=known.norms[-1] if known.norms else None,
        usual_norm=median(known.norms) if known.norms else None,
        refused=refused,
        kl={one.probe.name: one.readings[0].value for one in found if one.readings[0].metric == "kl"},
        healthy_step=max((step for step in passed_steps(state.gate_history) if step in left), default=None),
        run_dir=str(run_dir),
        tokens=state.tokens,
        budget=config.train.tokens,
    )


def found_and_refused(lines: Iterable[dict]) -> tuple[int, int]:
    """Odd rows and refused updates, by a ledger's lines.

    Those of an earlier run in the folder do not count, nor those behind a checkpoint that the run went back to.
    """
    odd, refused = Counter(), Counter()  # by step
    for line in lines:
        kind = line.get("kind")
        if kind == "restore":
            last = line.get("step", 0) if line.get("same_run", line.get("mode") == "full") else -1
            odd, refused = (Counter({at: n for at, n in of.items() if at <= last}) for of in (odd, refused))
        elif kind == "odd_row":
            odd[line.get("step", 0)] += 1
        elif kind == guarding.KIND and line.get("action") == SKIP:
            refused[line.get("step", 0)] += 1
    return odd.total(), refused.total()


def _replay_share(roles: Mapping[str, str], sources: Mapping[str, Mapping]) -> float | None:
    tokens = {name: sources[name]["tokens"] for name in roles if name in sources}
    replay = sum(count for name, count in tokens.items() if roles[name] == "replay")
    return replay / max(1, sum(tokens.values())) if "replay" in roles.values() else None


def has_template_of(run_dir: Path, origin: Path) -> bool:
    """Of the model that a run trains.

    ``origin`` may be gone by now, as retention removes a run's own checkpoints; the run has a copy of its files, but not yet
    while it starts.
    """
    folder = next((of for of in (origin, run_dir / MODEL_FILES) if (of / HF_FOLDER).is_dir()), origin)
    try:
        return has_template(TextTokenizer.load(folder / HF_FOLDER))
    except InputError:  # a model that was imported without one
        return False

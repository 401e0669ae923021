"""What a checkpoint holds beside its tensors; read without megatron-core."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from cpt_mega.errors import CheckpointError
from cpt_mega.json_types import Count, Range, type_problem
from cpt_mega.lineage import read_json

STATE_FILE = "trainer_state.json"
FORMAT = 1
ON_PERPLEXITY = {"general_perplexity_limit", "domain_gain", "domain_price"}  # rules that look at nothing else


class Score(TypedDict):
    """How far a bucket is from step 0, as ``gates.changes`` has it, with its 95 % interval; None: not finite.

    ``of``: the probes that it is of, by digest, and how each was measured.
    """

    gain: float | None
    low: float | None
    high: float | None
    of: dict[str, str]


class Look(TypedDict):
    """What a look of the gates found: ``perplexity``, ``scores`` and the ``weights`` of a choice by bucket, ``objections`` with
    their level (soft, hard) by rule, ``doubtful``, the rules that would not have a run go back to it, and ``judged_by``, all
    rules that said anything."""

    step: Count
    tokens: Count
    perplexity: dict[str, float]
    action: str
    objections: NotRequired[dict[str, str]]
    doubtful: NotRequired[list[str]]
    judged_by: NotRequired[list[str]]
    scores: NotRequired[dict[str, Score]]
    weights: NotRequired[dict[str, float]]


@dataclass
class TrainerState:
    """Everything of a run that is not a tensor. Tokens are real tokens of packed documents.

    Attributes:
        run_id, parent: this run, and the checkpoint or run its weights came from.
        step, tokens: optimizer steps done and tokens consumed.
        stream: the data state, as ``StreamState.to_json`` gives it.
        baseline: step-0 readings of the gates, ``{bucket: perplexity}``.
        baseline_tokens: tokens of the run at which the reading of a bucket was taken; those that are not in it at step 0.
        item_baseline: step-0 score of each item, ``{digest of its probe: {id: score}}``.
        item_noise: by how much step 0 disagreed with itself when its items were scored twice, ``{digest of the probe: share}``.
        source_losses: training losses by source since the last decision on weights: ``{name: [sum, steps]}``.
        judged_step: the last step at which the gates judged.
        look_pending: whether a look was due at this step and a stop came into its middle.
        gate_stop: why a gate stopped the run here; empty otherwise. A later start judges again before it goes on.
        kind: why it was saved, as ``retention`` has it: rolling, permanent, pinned or start.
        first_step: that the run began from, in this folder: 0, or that of the checkpoint that it goes on from elsewhere.
        gate_history: oldest first.
        steering: what gates have changed of the run, as ``gates.steering.Steering.to_json`` gives it.
        anomaly: what the guard knows, as ``gates.anomaly.AnomalyState.to_json`` gives it; empty for one who knows nothing.
        layout: the fields of the ``engine.mesh.Layout`` it was saved at.
        config: the resolved configuration it was saved under.
        lineage: digests and versions: base, parent and own weights, tokenizer, corpora, code, libraries, the restore
            mode that the run ``began`` with and that of its last start.
    """

    run_id: str
    parent: str
    step: Count = 0
    tokens: Count = 0
    stream: dict = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    baseline_tokens: dict[str, Count] = field(default_factory=dict)
    item_baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    item_noise: dict[str, float] = field(default_factory=dict)
    source_losses: dict[str, list[float]] = field(default_factory=dict)
    judged_step: Count | None = None
    look_pending: bool = False
    gate_stop: str = ""
    kind: str = "permanent"
    first_step: Count = 0
    gate_history: list[Look] = field(default_factory=list)
    steering: dict = field(default_factory=dict)
    anomaly: dict = field(default_factory=dict)
    layout: dict[str, Annotated[int, Range(1, 2**31 - 1)]] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    lineage: dict = field(default_factory=dict)

    @property
    def health(self) -> str:
        """``healthy``: gates judged at this very step and none objected; ``unhealthy``: one did; ``warned``; ``not judged``.

        Perplexity stands while abilities go, so it cannot pass anything by itself: ``perplexity only``.
        """
        here = [look for look in self.gate_history if look["step"] == self.step]
        if not here or here[-1]["action"] == "none":  # a look that no gate judged
            return "not judged"
        if here[-1]["action"] != "continue":
            return "warned" if here[-1]["action"] in ("warn", "anneal") else "unhealthy"
        return "perplexity only" if set(here[-1].get("judged_by", ())) <= ON_PERPLEXITY else "healthy"


class _Lineage(TypedDict):
    """What a run that goes on asks its lineage for; there may be more."""

    tokenizer_digest: str
    corpora: dict[str, str]
    eval: dict[str, str]
    packing_version: NotRequired[Any]


def has_state(folder: Path) -> bool:
    """Whether a folder is a run's checkpoint; an import has weights alone."""
    return (folder / STATE_FILE).is_file()


def read_state(folder: Path) -> TrainerState:
    """``trainer_state.json`` of a run's checkpoint. Raises CheckpointError for an import or an unreadable file."""
    path = folder / STATE_FILE
    if not has_state(folder):
        fix = "holds weights only (an import); use restore.mode=weights, or name a checkpoint of a run"
        raise CheckpointError("model.checkpoint", str(folder), fix)
    try:
        values = read_json(path)
        if values.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        problem = type_problem(values, TrainerState) or _problem(values)
        if problem is not None:
            raise ValueError(problem)
        return TrainerState(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("model.checkpoint", str(path), f"cannot be read ({error}); use an older one") from error


def _problem(values: dict) -> str | None:
    lineage = values.get("lineage", {})
    asked = {name: lineage[name] for name in _Lineage.__annotations__ if name in lineage}
    odd = next((name for name, sums in values.get("source_losses", {}).items() if len(sums) != 2), None)
    return type_problem(asked, _Lineage, "lineage") or (odd and f"source_losses.{odd} is no sum and count")

"""Whether a run begins with the model that was imported: its own log-probabilities beside those of ``transformers``.

Before the first update the texts of an import's reference values (``hf/reference.py``) go through the forward pass that looks
use, at the run's own layout and precision. What is further off than its precision explains is refused, and the first layer is
named whose hidden states are another's.
"""

from dataclasses import dataclass

import numpy as np

from cpt_mega.checkpoint.restore import FULL, Start
from cpt_mega.checkpoint.trainer_state import has_state
from cpt_mega.engine.mesh import Mesh
from cpt_mega.engine.precision import is_fp8
from cpt_mega.engine.step import Engine
from cpt_mega.errors import CheckpointError
from cpt_mega.gates.asking import distributions, hidden_states
from cpt_mega.gates.requests import Request
from cpt_mega.hf.model_info import ModelInfo
from cpt_mega.hf.reference import Reference, read_reference, remake_command

# Mean absolute difference of log-probabilities, nats: how far the same weights may be off in a precision.
LIMITS = {"fp32": 1e-4, "bf16": 0.02}
FP8_LIMIT = 0.05
# Relative difference of hidden states from which on a layer is another. Rounding alone makes 1e-6 (fp32) and 0.02 (bf16) of the
# last of 32 layers of a random Llama with weights of 0.03; with weights of 0.1, which amplify it, 1e-5 and 0.2.
_HIDDEN_LIMITS = {"fp32": 1e-4, "bf16": 0.1}
_FP8_HIDDEN_LIMIT = 0.3


@dataclass(frozen=True)
class Identity:
    """The outcome of a comparison that was passed: ``mean_difference`` and ``limit`` in nats, over ``tokens`` targets."""

    mean_difference: float
    limit: float
    tokens: int

    def to_json(self) -> dict:
        """Its line in the ledger."""
        values = {"mean_difference": self.mean_difference, "limit": self.limit, "tokens": self.tokens}
        return {"kind": "identity", **values}

    def __str__(self) -> str:
        return (
            f"identity: log-probabilities of {self.tokens:,} tokens differ by {self.mean_difference:.2g} on average from those "
            f"of transformers (limit {self.limit:g})"
        )


def has_moved(start: Start) -> bool:
    """Whether a start's weights are a run's, and not an import's as it was made: nothing can be said of them then."""
    return start.mode == FULL or has_state(start.folder)


def reference_values(mesh: Mesh, start: Start, info: ModelInfo) -> Reference | None:
    """What a start is to be compared with; None where there is nothing. A collective.

    Raises CheckpointError, the same on all ranks, for values that are not the import's or cannot be read.
    """
    found = None
    if mesh.is_main and not has_moved(start):
        try:
            found = read_reference(start.folder, info)
        except CheckpointError as error:
            found = error
    found = mesh.share(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def check_identity(engine: Engine, start: Start, reference: Reference, row_tokens: int) -> Identity:
    """Compares the model that an engine has loaded with reference values.

    Args:
        row_tokens: of a packed row.

    A collective. Raises CheckpointError, the same on all ranks, for another model.
    """
    requests = [Request(text, 1) for text in reference.texts]
    found, _ = distributions(engine, requests, row_tokens, reference.targets[:, None])
    mean = engine.mesh.share(float(np.abs(found[:, 0] - reference.logprobs).mean()))
    precision = engine.config.precision
    limit = LIMITS.get(precision, FP8_LIMIT)
    if mean <= limit:  # NaN is not
        return Identity(mean, limit, len(reference.logprobs))
    hidden = hidden_states(engine, requests, row_tokens, reference.projection)
    where = engine.mesh.share(first_difference(hidden, reference.hidden, hidden_limit(precision)))
    words = f"log-probabilities differ by {mean:.3g} on average from those that transformers gave"
    advice = "import the model again; if that changes nothing, it is not computed as transformers does it"
    fix = f"{words} (limit {limit:g} in {precision}); {where}; {advice}"
    raise CheckpointError("model.checkpoint", str(start.folder), fix)


def no_values_note(start: Start) -> str:
    """How to have the start of an import compared that has no values."""
    return f"identity: not compared with transformers; {remake_command(start.folder)} makes the values for that"


def hidden_limit(precision: str) -> float:
    return _FP8_HIDDEN_LIMIT if is_fp8(precision) else _HIDDEN_LIMITS[precision]


def first_difference(found: np.ndarray, expected: np.ndarray, limit: float) -> str:
    """Names the first stage of a model that is not as expected, if one stands out.

    Args:
        found, expected: hidden states [layers + 2, targets, numbers].
        limit: relative difference, from which on a stage is another.
    """
    differences = stage_differences(found, expected)
    layers = len(differences) - 2
    stages = ["the embedding", *(f"layer {layer} (of 0 to {layers - 1})" for layer in range(layers)), "the final norm"]
    beyond = np.flatnonzero(~(differences <= limit))
    stage = int(beyond[0]) if len(beyond) else layers + 1
    before, here = differences[stage - 1] if stage else 0.0, differences[stage]
    most = stages[int(np.diff(differences[: stage + 1], prepend=0.0).argmax())]
    if not len(beyond):
        words = f"the output layer is left: hidden states differ by {here:.2g} of their size at the final norm"
        return f"{words}, where up to {limit:g} may be rounding, most of it from {most}"
    if before > here / 2:
        words = f"hidden states drift apart, to {here:.2g} of their size at {stages[stage]}, most of it from {most}"
        return f"{words}: a small error there, or rounding that this model makes larger"
    return (
        f"the first layer that differs is {stages[stage]}: its output by {here:.2g} of its size, {before:.2g} before it"
    )


def stage_differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[stages]: how far hidden states are off, relative to their size; the mean over targets."""
    distance = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return (distance / np.maximum(size, np.finfo(np.float32).tiny)).mean(axis=1)

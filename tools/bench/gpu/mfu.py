"""Model FLOP utilisation: how much of a GPU's peak a training step uses, counting what the model needs and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

# Dense peaks of H100 SXM and H200 by NVIDIA's datasheets, FLOP/s. FP8 runs are measured against the FP8 peak although
# attention and the output layer stay in bf16.
PEAKS = {"bf16": 989e12, "fp8": 1979e12}
FORMULA = (
    "FLOPs a token = 6 x (weights of the layers' matrices) + 6 x hidden x vocabulary (output layer) "
    "+ 6 x layers x hidden x attended, where attended is the sequence length for rows of one document and "
    "sum(length^2) / sum(length) for packed ones (causal: half of it on average, twice for scores and values). "
    "Embedding, norms and recomputation count nothing."
)


@dataclass(frozen=True)
class Sizes:
    """What a dense decoder with gated MLPs multiplies by; counts and elements."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of all layers, without embedding and output layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)


def attended(lengths: Sequence[int]) -> float:
    """Tokens of its own document that a token's row of scores has room for, on average over documents of these lengths."""
    return sum(length * length for length in lengths) / sum(lengths)


def flops_per_token(sizes: Sizes, lengths: Sequence[int]) -> float:
    """Forward and backward FLOPs of one token, see FORMULA; ``lengths`` are those of the documents of a step."""
    scores = 6 * sizes.layers * sizes.heads * sizes.head_dim * attended(lengths)
    return 6 * sizes.layer_weights + 6 * sizes.hidden * sizes.vocab + scores


def mfu(sizes: Sizes, lengths: Sequence[int], tokens_per_s: float, precision: str) -> float:
    """Share of the peak that ``precision`` has (FP8 recipes: the FP8 peak), 0 to 1."""
    peak = PEAKS["bf16" if precision == "bf16" else "fp8"]
    return flops_per_token(sizes, lengths) * tokens_per_s / peak

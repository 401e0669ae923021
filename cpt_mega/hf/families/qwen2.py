"""Qwen2 and Qwen2.5: Llama with biases on query, key and value; some layers may have a sliding window.

Source: ``transformers/models/qwen2``.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.families import llama
from cpt_mega.hf.shape import MOST_LAYERS, ModelShape
from cpt_mega.hf.tensor_map import Rule

_WINDOWED, _FULL = "sliding_attention", "full_attention"


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Qwen2."""
    reader.only("use_mrope", False)
    return llama.read_decoder(reader, "qwen2", qkv_bias=True, **read_windows(reader))


def read_windows(reader: ConfigReader) -> dict:
    """Qwen's sliding window: off unless ``use_sliding_window``; in the layers that ``layer_types`` names, or in those
    from ``max_window_layers`` on."""
    window = reader.window(4096)
    if not reader.flag("use_sliding_window", False):
        window = None
    layers, first = reader.size("num_hidden_layers", most=MOST_LAYERS), reader.count("max_window_layers", 28)
    default = [_WINDOWED if window is not None and i >= first else _FULL for i in range(layers)]
    types = reader.layer_types(default, frozenset({_WINDOWED, _FULL} if window is not None else {_FULL}))
    if _WINDOWED not in types:
        return {}
    return {
        "sliding_window": window,
        "full_attention_layers": tuple(i for i, kind in enumerate(types) if kind == _FULL),
    }


def tensor_rules(shape: ModelShape) -> list[Rule]:
    """Llama's tensors and the three biases, which core holds as one."""
    return [*llama.tensor_rules(shape), llama.qkv_rule(shape, "bias", ())]

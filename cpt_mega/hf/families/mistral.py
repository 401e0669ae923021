"""Mistral 7B and models of the same layout: Llama with a sliding window over all layers.

Source: ``transformers/models/mistral``. A config without ``sliding_window`` means 4096 there; ``null`` means none.
"""

from cpt_mega.hf.config_reader import ConfigReader
from cpt_mega.hf.families import llama
from cpt_mega.hf.shape import ModelShape


def read_shape(reader: ConfigReader) -> ModelShape:
    """The shape of a Mistral."""
    return llama.read_decoder(reader, "mistral", kv_heads=8, sliding_window=reader.window(4096))


tensor_rules = llama.tensor_rules

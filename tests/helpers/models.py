"""Small random models in Hugging Face folders, with every property that a conversion can get wrong."""

from functools import partial
from pathlib import Path

import torch

SIZES = {
    "vocab_size": 301,  # no multiple of anything that pads
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
# What a family's own defaults would hide or make large. Windows are shorter than the tests' documents.
FAMILY_SIZES = {
    "mistral": {"sliding_window": 6},
    "qwen3": {"head_dim": 12},
    "phi3": {"sliding_window": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def tiny_model(
    family: str,
    folder: str | Path,
    *,
    dtype=torch.float32,
    seed=0,
    tokenizer=False,
    max_shard_size="5GB",
    **overrides,
) -> Path:
    """A random model of a ``model_type`` in ``folder``; ``overrides`` are fields of its config. Returns the folder.

    Norms are not one and biases not zero, which would hide a swap.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILY_SIZES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer(folder, config.vocab_size)
    return Path(folder)


tiny_llama = partial(tiny_model, "llama")
tiny_mistral = partial(tiny_model, "mistral")
tiny_qwen2 = partial(tiny_model, "qwen2")
tiny_qwen3 = partial(tiny_model, "qwen3")
tiny_phi3 = partial(tiny_model, "phi3")


# fmt: off
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# One line a model, which is what a new family adds: it is converted there and back, and scored at every layout.
# Documents of the parity tests are longer than every window here.
MODELS = {
    "llama": (tiny_llama, {}),
    "llama_tied_one_kv_head": (tiny_llama, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama_odd_heads": (tiny_llama, {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama_llama3_rope": (tiny_llama, {"rope_parameters": LLAMA3}),
    "llama_dynamic_rope": (tiny_llama, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama_yarn_rope": (tiny_llama, {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}),
    "llama_linear_rope_wide_heads": (
        tiny_llama, {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama_eight_heads": (tiny_llama, {"num_attention_heads": 8}),
    "mistral": (tiny_mistral, {}),
    "mistral_narrow_heads": (tiny_mistral, {"head_dim": 4, "tie_word_embeddings": True, "sliding_window": 1}),
    "qwen2": (tiny_qwen2, {}),
    "qwen2_tied": (tiny_qwen2, {"tie_word_embeddings": True}),
    "qwen2_yarn_windows": (tiny_qwen2, {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 5,
                                        "max_window_layers": 2, "num_attention_heads": 14, "hidden_size": 56}),
    "qwen3": (tiny_qwen3, {}),
    "qwen3_tied_windows": (tiny_qwen3, {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8,
                                        "num_hidden_layers": 4,
                                        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3_partial_rope": (tiny_phi3, {"partial_rotary_factor": 0.5}),
}
# fmt: on


def tiny_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer trained on a few sentences, with BOS, EOS and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "a stitch in time"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)

"""Small random models in Hugging Face folders, with every property that a conversion can get wrong."""

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


def tiny_llama(
    folder: str | Path, *, dtype=torch.float32, seed=0, tokenizer=False, max_shard_size="5GB", **overrides
) -> Path:
    """A random Llama in ``folder``; ``overrides`` are fields of LlamaConfig. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(
        LlamaForCausalLM, LlamaConfig(**{**SIZES, **overrides}), folder, dtype, seed, tokenizer, max_shard_size
    )


def tiny_qwen2(
    folder: str | Path, *, dtype=torch.float32, seed=0, tokenizer=False, max_shard_size="5GB", **overrides
) -> Path:
    """A random Qwen2 in ``folder``, biases not zero; ``overrides`` are fields of Qwen2Config. Returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _save(
        Qwen2ForCausalLM, Qwen2Config(**{**SIZES, **overrides}), folder, dtype, seed, tokenizer, max_shard_size
    )


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


def _save(model_class, config, folder, dtype, seed, tokenizer, max_shard_size) -> Path:
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():  # norms of one and biases of zero would hide a swap
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer(folder, config.vocab_size)
    return Path(folder)

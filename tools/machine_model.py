"""A byte-level tokenizer and a random Llama of it, as folders that a user already has: for the quickstart and benchmarks.

Like ``machine_text.py``: nothing is downloaded, and the same texts give the same files on every machine.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def byte_level_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str],
    pattern: str | None = None,
    normalizer: normalizers.Normalizer | None = None,
    **options,
) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts; the special tokens have the first ids.

    Args:
        pattern: how words are cut; None: as GPT-2 does.
        options: of the BPE model, such as ``ignore_merges``.
    """
    tokenizer = Tokenizer(models.BPE(**options))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated"), letters] if pattern else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut) if cut else letters
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_random_llama(folder: Path, tokenizer: Tokenizer, seed: int, **sizes: int) -> int:
    """Writes a Hugging Face folder with a tokenizer, whose token 0 ends documents, and a Llama that knows nothing.

    Args:
        seed: of the weights.
        sizes: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers`` and ``max_position_embeddings``.

    Returns:
        How many parameters it has.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(0))
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())

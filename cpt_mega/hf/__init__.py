"""Hugging Face on one side, megatron-core's names on the other: families, tensor maps, file-to-file conversion."""

"""The random model of some benchmarks: a small Llama with a tokenizer that is trained on the benchmark's texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def save_small_llama(
    folder: Path,
    texts: Sequence[str],
    *,
    vocab_size: int,
    width: int = 128,
    layers: int = 2,
    heads: int | None = None,
    positions: int = 512,
) -> None:
    """Save the model and its tokenizer in ``folder``. ``heads``: attention heads (None: of width 64, at least two)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.pretraining.config import TokenizerSettings
    from stages.pretraining.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=vocab_size))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads or max(2, width // 64),
        max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def raw_texts() -> list[str]:
    """2,000 texts of the embedded world."""
    from stages.config import DataInput
    from stages.corpora.text import load_text

    return load_text(DataInput.model_validate({"train": {"path": "world:raw", "limit": 2000}})).train

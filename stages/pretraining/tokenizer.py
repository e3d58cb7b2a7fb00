"""A byte-level BPE tokenizer trained on a corpus."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.pretraining.config import TokenizerSettings

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Sequence[str], settings: TokenizerSettings) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with ``settings.vocab_size`` tokens. Equal texts give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END, PAD, *settings.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=settings.special_tokens,
        clean_up_tokenization_spaces=False,
    )

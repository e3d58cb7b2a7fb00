"""Concatenate texts into one token sequence and cut it into rows: blocks for training, overlapping windows for perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from stages.errors import DataError, ModelError
from stages.models.quiet import quiet_transformers
from stages.process.console import in_progress
from stages.tokens.continuation import shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 256  # texts that the tokenizer encodes together


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Encode all texts as one token sequence. Each text ends with the end token, and begins with the tokenizer's usual prefix tokens.

    Raises ModelError if the tokenizer has no end token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no end token (eos_token), which separates documents; set one in its tokenizer_config.json")
    tokens: list[int] = []
    with quiet_transformers(), in_progress("encoding texts", len(texts)) as done:  # a document may exceed the model's context: it is cut
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            for ids in tokenizer(some)["input_ids"]:
                tokens += shared_ids(ids)
                if not ids or ids[-1] != eos:
                    tokens.append(eos)
            done(len(some))
    return tokens


def pack_blocks(tokens: Sequence[int], block_size: int) -> torch.Tensor:
    """Cut ``tokens`` into rows of ``block_size``. Returns a long tensor [blocks, block_size]; an incomplete last block is dropped.

    Raises DataError if there is less than one block.
    """
    count = len(tokens) // block_size
    if count == 0:
        raise DataError(f"the training corpus has {len(tokens)} tokens, less than one block; lower block_size={block_size} or add text")
    return torch.tensor(tokens[: count * block_size], dtype=torch.long).view(count, block_size)


def overlapping_windows(tokens: Sequence[int], block_size: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Rows of (ids, mask) that predict every token except the first exactly once: windows overlap by one token."""
    rows = [tokens[start : start + block_size] for start in range(0, len(tokens) - 1, block_size - 1)]
    return [(row, [1] * len(row)) for row in rows]

"""Tokenize reviews, and make batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from stages.corpora.reviews import Review


class EncodedReview(TypedDict):
    """The token ids of a review, and the index of its class."""

    input_ids: list[int]
    labels: int


def encode(reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase) -> tuple[list[EncodedReview], int]:
    """Return (rows of input_ids and labels, number of truncated rows)."""
    texts = [review.text for review in reviews]
    untruncated = tokenizer(texts, verbose=False)["input_ids"]
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    rows: list[EncodedReview] = [{"input_ids": ids, "labels": review.label} for ids, review in zip(encoded, reviews, strict=True)]
    return rows, sum(len(ids) > len(kept) for ids, kept in zip(untruncated, encoded, strict=True))


class Collator:
    """Batches rows as input_ids and attention_mask [B, T], padded on the right, and labels [B]."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[EncodedReview]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [self.pad_token_id] * (width - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

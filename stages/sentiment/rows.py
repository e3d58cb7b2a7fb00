"""Tokenize reviews, and make batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import torch
from transformers import PreTrainedTokenizerBase

from stages.corpora.reviews import Review
from stages.models.classifiers.inputs import Padding, Row, padded_rows, row_of


class EncodedReview(TypedDict):
    """The token ids of a review (and their types, if the model reads them), and the index of its class."""

    input_ids: list[int]
    token_type_ids: NotRequired[list[int]]
    labels: int


def encode(
    reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase, arguments: frozenset[str] = frozenset({"input_ids"})
) -> tuple[list[EncodedReview], int]:
    """Return (rows with labels, number of truncated rows). ``arguments``: the names of what the model reads."""
    texts = [review.text for review in reviews]
    untruncated = tokenizer(texts, verbose=False)["input_ids"]
    encoded = tokenizer(texts, truncation=True)
    inputs = [row_of({name: values[index] for name, values in encoded.items()}, arguments) for index in range(len(texts))]
    rows = [cast("EncodedReview", {**row, "labels": review.label}) for row, review in zip(inputs, reviews, strict=True)]
    return rows, sum(len(ids) > len(row["input_ids"]) for ids, row in zip(untruncated, rows, strict=True))


class Collator:
    """Batches rows as input_ids, attention_mask and token_type_ids (if the rows have them) [B, T], and labels [B]."""

    def __init__(self, pad_token_id: int, padding: Padding = "right") -> None:
        self.pad_token_id, self.padding = pad_token_id, padding

    def __call__(self, rows: Sequence[EncodedReview]) -> dict[str, torch.Tensor]:
        inputs = [cast("Row", {name: values for name, values in row.items() if name != "labels"}) for row in rows]
        return {**padded_rows(inputs, self.pad_token_id, self.padding), "labels": torch.tensor([row["labels"] for row in rows])}

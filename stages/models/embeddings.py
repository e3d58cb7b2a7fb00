"""The rows of a model's embedding: how many a tokenizer needs, and new rows for its new tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from stages.errors import ModelError
from stages.sampling.support import weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel


def grow_embedding(model: TransformersModel, size: int) -> range:
    """Grow the embedding (and the output matrix) to at least ``size`` rows. Returns the new rows; each one is the mean of the old rows.

    The mean is deterministic and gives no new token an extreme logit. Raises ModelError for a family that reads characters or bytes.
    """
    try:
        rows = weight_of(model.get_input_embeddings()).shape[0]
    except (NotImplementedError, AttributeError) as error:  # CANINE, Perceiver
        raise ModelError(
            f"{type(model).__name__} has no embedding with one row per token; use a family that has one, such as BERT"
        ) from error
    if size <= rows:
        return range(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for matrix in matrices:
            if matrix is not None and (weight := weight_of(matrix)).shape[0] == size:
                weight[rows:] = weight[:rows].mean(dim=0)
    return range(rows, size)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of embedding rows that ``tokenizer`` needs: its highest token id plus one."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def resize_embedding(model: TransformersModel, tokenizer: PreTrainedTokenizerBase) -> Collection[int]:
    """Grow the embedding (and the output matrix) to fit ``tokenizer``. Returns the new rows that need training.

    Also sets the config's pad token. Its row needs no training, because nothing reads or predicts it.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return [row for row in grow_embedding(model, vocabulary_size(tokenizer)) if row != tokenizer.pad_token_id]

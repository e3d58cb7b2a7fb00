"""Adds rows to the embedding of a model whose tokenizer has more tokens than the embedding has rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.sampling.support import weight_of

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


def grow_embedding(model: TransformersModel, size: int) -> range:
    """Grow the embedding (and the output matrix) to at least ``size`` rows. Returns the new rows; each one is the mean of the old rows.

    The mean is deterministic and gives no new token an extreme logit.
    """
    rows = weight_of(model.get_input_embeddings()).shape[0]
    if size <= rows:
        return range(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for matrix in matrices:
            if matrix is not None and (weight := weight_of(matrix)).shape[0] == size:
                weight[rows:] = weight[:rows].mean(dim=0)
    return range(rows, size)

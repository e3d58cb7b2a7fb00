"""A language model in memory, together with its tokenizer and its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stages.models.loading import load_language_model, load_tokenizer
from stages.models.parts import moved_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel
    from stages.registry.references import ResolvedModel


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and the resolved model from which both were loaded, in ``dtype``.

    ``merges_adapters``: whether loading merged the adapters of ``source`` into the weights, as it does without quantization.
    """

    model: TransformersModel
    tokenizer: PreTrainedTokenizerBase
    source: ResolvedModel
    dtype: torch.dtype
    merges_adapters: bool = True

    @classmethod
    def frozen(cls, source: ResolvedModel, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """Load a model that only computes. Raises ModelError if it cannot be loaded."""
        tokenizer = load_tokenizer(source)
        model = load_language_model(source, dtype=dtype, trainable=False, tokenizer=tokenizer)
        return cls(moved_to(model, device).eval(), tokenizer, source, dtype)

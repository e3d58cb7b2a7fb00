"""The parts of a language model that roles need, whatever a family calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.errors import ModelError


def transformer_of(model: Any) -> Any:
    """The transformer inside a causal language model (or inside a PeftModel of one): all but the output matrix.

    Raises ModelError for a class that does not say where its transformer is.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(plain, plain.base_model_prefix, None) if plain.base_model_prefix else None
    if found is None:  # as in Llama 4's text model, whose prefix is not the name
        children = [child for child in plain.children() if isinstance(child, PreTrainedModel)]
        found = children[0] if len(children) == 1 else None
    if found is None:
        raise ModelError(f"{type(plain).__name__} keeps its transformer under no name that is known here; take a model of another family")
    return found


@torch.no_grad()
def hidden_width(backbone: nn.Module) -> int:
    """The width d of the last hidden states [B, T, d] that ``backbone`` gives, found by reading one token.

    Configs do not tell: OPT-350m computes with ``hidden_size`` 1024 and gives 512, its ``word_embed_proj_dim``.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=next(backbone.parameters()).device)
    training = backbone.training
    backbone.eval()
    try:
        return int(backbone(input_ids=ids, use_cache=False).last_hidden_state.shape[-1])
    finally:
        backbone.train(training)

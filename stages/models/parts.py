"""Access to the parts of a language model, independent of the names that a family uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.errors import ModelError


def transformer_of(model: Any) -> Any:
    """The transformer inside a causal language model (or a PeftModel of one), without the output matrix.

    Raises ModelError if its attribute cannot be determined.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    transformer = getattr(plain, plain.base_model_prefix, None) if plain.base_model_prefix else None
    if transformer is None:  # e.g. Llama 4's text model, whose prefix is not the attribute name
        children = [child for child in plain.children() if isinstance(child, PreTrainedModel)]
        transformer = children[0] if len(children) == 1 else None
    if transformer is None:
        raise ModelError(f"{type(plain).__name__} stores its transformer under an unknown attribute; use another model family")
    return transformer


@torch.no_grad()
def hidden_width(backbone: nn.Module) -> int:
    """The width d of ``backbone``'s last hidden states [B, T, d], measured on one token.

    The config is not reliable: OPT-350m has ``hidden_size`` 1024 but outputs width 512, its ``word_embed_proj_dim``.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=next(backbone.parameters()).device)
    training = backbone.training
    backbone.eval()
    try:
        return int(backbone(input_ids=ids, use_cache=False).last_hidden_state.shape[-1])
    finally:
        backbone.train(training)

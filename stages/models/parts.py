"""Access to the parts of a language model, independent of the names that a family uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.errors import ModelError
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


Model = TypeVar("Model", bound=nn.Module)


def transformer_of(model: TransformersModel) -> PreTrainedModel:
    """The transformer inside a causal language model (or a PeftModel of one), without the output matrix.

    Raises ModelError if its attribute cannot be determined.
    """
    plain = plain_model(model)
    transformer: PreTrainedModel | None = getattr(plain, plain.base_model_prefix, None) if plain.base_model_prefix else None
    if transformer is None:  # e.g. Llama 4's text model, whose prefix is not the attribute name
        children = [child for child in plain.children() if isinstance(child, PreTrainedModel)]
        transformer = children[0] if len(children) == 1 else None
    if transformer is None:
        raise ModelError(f"{type(plain).__name__} stores its transformer under an unknown attribute; use another model family")
    return transformer


def moved_to(model: Model, target: torch.device | torch.dtype) -> Model:
    """Move ``model`` to a device, or convert it to a dtype, in place; returns it.

    It is ``model.to(target)``, whose annotation in transformers no type checker can read.
    """
    module: nn.Module = model
    module.to(target)
    return model


@torch.no_grad()
def hidden_width(backbone: nn.Module) -> int:
    """The width d of ``backbone``'s last hidden states [B, T, d], measured on one token.

    The config is not reliable: OPT-350m has ``hidden_size`` 1024 but outputs width 512, its ``word_embed_proj_dim``.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=next(backbone.parameters()).device)
    with evaluation_mode(backbone):
        return int(backbone(input_ids=ids, use_cache=False).last_hidden_state.shape[-1])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager in which ``model`` is in evaluation mode. Afterwards it has the mode from before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of a module of ``model``."""
    return next(name for name, module in model.named_modules() if module is wanted)

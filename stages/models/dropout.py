"""Dropout on the residual branches alone (Ouyang et al. 2022, C.1: 0.2 in supervised fine-tuning), for any family of decoders.

Many of today's families have no dropout modules where GPT had them, so the branches' outputs are dropped by forward hooks: no weight, no
module and no name changes, and what is saved is as it was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from stages.errors import ModelError
from stages.models.loading import disable_dropout

BRANCHES = ("self_attn", "self_attention", "attn", "attention", "mlp", "feed_forward", "ffn", "fc2")


def set_residual_dropout(model: Any, probability: float) -> int:
    """Drop what each attention and each MLP adds to the residual stream, in training mode; every other dropout goes to 0.

    Returns how many branches there are. Raises ModelError for a model whose layers have not exactly two.
    """
    disable_dropout(model)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = 0
    for layer in _layers(plain):
        branches = [child for name, child in layer.named_children() if name in BRANCHES]
        if len(branches) != 2:
            names = ", ".join(name for name, _ in layer.named_children())
            raise ModelError(
                f"residual_dropout: a layer of {type(plain).__name__} has the parts {names}; an attention and an MLP were expected among "
                "them. Leave residual_dropout out for this family"
            )
        for branch in branches:
            branch.register_forward_hook(_dropper(probability))
            found += 1
    return found


def _layers(model: Any) -> nn.ModuleList:
    number = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ModelError(f"residual_dropout: {type(model).__name__} has no list of {number} layers; leave residual_dropout out for this family")


def _dropper(probability: float) -> Any:
    def drop(module: nn.Module, inputs: Any, output: Tensor | tuple[Any, ...]) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (functional.dropout(output[0], probability), *output[1:])
        return functional.dropout(output, probability)

    return drop

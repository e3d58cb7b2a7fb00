"""Merge the adapters of a model into its weights.

Merging a stack (stacks.py) from the bottom up gives full weights. On a quantized base the adapters stay unmerged: rounding would destroy
their updates, so the next step would load a different model than the one that was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.models.adapters.activation import activate, active_adapters, is_adapter_layer, quiet_peft
from stages.models.adapters.saved import base_of, is_tied
from stages.models.layers.replacing import use_folded_adapters
from stages.sampling.support import plain_model, weight_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel


def merge(model: PeftModel, *, where: Callable[[nn.Module], bool] | None = None) -> TransformersModel:
    """Merge the active adapters of a PeftModel into the weights and return the plain model.

    A tied embedding is untied if an adapter changes only one of embedding and output layer. ``where`` (a predicate of the base layer)
    restricts merging to some layers; the result stays a PeftModel if other layers still have an adapter.
    """
    plain = plain_model(model)
    was_tied = _untie(plain)
    with quiet_peft():
        merged = model.merge_and_unload(safe_merge=True) if where is None else _merge_some(model, where)
    if was_tied:
        _tie_if_equal(plain_model(merged))
    return merged


def _untie(plain: PreTrainedModel) -> bool:
    """If an adapted embedding is tied, give the output layer its own copy of the weights. Returns whether it did."""
    output, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if output is None or not is_tied(plain) or (base_of(output) is output and base_of(embedding) is embedding):
        return False
    base_of(output).weight = nn.Parameter(weight_of(base_of(output)).detach().clone(), requires_grad=False)
    return True


def _tie_if_equal(plain: PreTrainedModel) -> None:
    """Tie embedding and output layer again if they are equal; else record in the config that they are not tied."""
    output, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    one, other = weight_of(output), weight_of(embedding)
    are_equal = one.shape == other.shape and torch.equal(one, other)
    for config in (plain.config, plain.config.get_text_config()):
        config.tie_word_embeddings = are_equal  # peft has set it to False
    if are_equal:
        output.weight = embedding.weight
    else:
        plain.all_tied_weights_keys = {}  # keys that save_pretrained would omit


def _merge_some(model: PeftModel, where: Callable[[nn.Module], bool]) -> TransformersModel:
    """Merge the adapted layers whose base layer satisfies ``where``. Full copies and rows replace those of the base."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    plain, acting = plain_model(model), active_adapters(model)
    chosen: dict[str, nn.Module] = {}
    for name, module in plain.named_modules():
        if any(name.startswith(f"{outer}.") for outer in chosen):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            chosen[name] = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif is_adapter_layer(module) and where(module.get_base_layer()):
            module.merge(safe_merge=True)
            chosen[name] = module.get_base_layer()
    for name, module in chosen.items():
        plain.set_submodule(name, module)
    if any(is_adapter_layer(module) for module in model.modules()):
        activate(model, acting)
        use_folded_adapters(model)
        return model
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain

"""Check that an adapter fits a model: its module names, its patterns, and the adapters that are already there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.config import LoraSettings
from stages.errors import ModelError
from stages.models.adapters.activation import (
    is_adapter_layer,
    lora_config,
)
from stages.models.adapters.saved import base_of, is_inside
from stages.models.adapters.variants import adapted_layers
from stages.models.families import unfit_products
from stages.models.parts import module_name
from stages.models.quantizing import quantization_of
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel


def excluded_names(modules: str | list[str]) -> str:
    """A regular expression for the full names of the modules that ``exclude_modules`` contains."""
    if isinstance(modules, str):
        return f"(?:{modules})"
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, modules))})" if modules else "(?!)"


def check_patterns(model: PeftModel, lora: LoraSettings, name: str) -> None:
    """Raise ModelError for a key of rank_pattern or alpha_pattern that names no module with the adapter ``name``; peft ignores it.

    Also if a module has two numbers: peft takes the first one, but saves the keys in another order.
    """
    layers = [path for path, _ in adapted_layers(model, name)]
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        fitting = {key: [layer for layer in layers if re.match(rf"(.*\.)?({key})$", layer)] for key in pattern}
        for key in pattern:
            if not fitting[key]:
                ends = sorted({layer.rpartition(".")[2] for layer in layers})
                raise ModelError(
                    f"lora.{field} names {key!r}, but no module with an adapter has this name. Modules with an adapter: {', '.join(ends)}"
                )
        for layer in layers:
            keys = [key for key in pattern if layer in fitting[key]]
            if len({pattern[key] for key in keys}) > 1:
                raise ModelError(
                    f"lora.{field} has several numbers for {layer}: {', '.join(f'{key!r}: {pattern[key]:g}' for key in keys)}. Change the "
                    "names such that only one fits, because adapter_config.json does not keep their order"
                )


def refuse_parameters(model: PeftModel, lora: LoraSettings, name: str) -> None:
    """Raise ModelError for an adapter that peft makes one of a parameter (routers, experts) although that is wrong.

    It does so for excluded modules, too. On a quantized module such an adapter is saved, but cannot be loaded again.
    """
    parameters = tuple(f".{target}" for target in lora_config(model, name).target_parameters or ())
    for path, layer in adapted_layers(model, name):
        is_quantized = f".{path}.weight".endswith(parameters) and quantization_of(base_of(layer))[0] != "none"
        if is_quantized or re.fullmatch(excluded_names(lora.exclude_modules), path):
            reason = "but the module is quantized" if is_quantized else "in spite of lora.exclude_modules"
            raise ModelError(
                f"peft makes the adapter of {path} of {type(plain_model(model)).__name__} one of a parameter, {reason}. "
                "Name the modules that get an adapter, without this one: lora.target_modules: [q_proj, v_proj, ...]"
            )


def has_name(module: str, name: str) -> bool:
    """Whether ``name`` is the module's name or its last parts."""
    return module == name or module.endswith(f".{name}")


def refuse_quantized_copies(plain: PreTrainedModel, who: str, names: Collection[str]) -> None:
    """Raise ModelError if one of the modules that ``modules_to_save`` names has quantized weights, which cannot be trained."""
    for name, module in plain.named_modules():
        if quantization_of(module)[0] != "none" and is_inside(name, names):
            raise ModelError(
                f"{who} has full weights of {name} (modules_to_save), which is quantized. Remove the module from modules_to_save, or load "
                "the model with quantization: none"
            )


def refuse_int8_dora(plain: PreTrainedModel, who: str) -> None:
    """Raise ModelError for a DoRA adapter on int8 layers on a CPU."""
    if any(quantization_of(module) == ("int8", "cpu") for module in plain.modules()):
        raise ModelError(f"{who} a DoRA adapter, which peft cannot compute on int8 weights on a CPU. Write quantization: nf4 or none")


def refuse_clash(plain: PreTrainedModel, who: str, config: LoraConfig) -> None:
    """Raise ModelError if two adapters change one module in different ways (update, full copy, rows).

    peft cannot compute this combination. In a model's own stack the lower adapters are merged; roles that share a backbone keep them
    unmerged.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    def is_named(module: str, names: Iterable[object] | None) -> bool:
        if isinstance(names, str):
            return names != "all-linear" and re.fullmatch(names, module) is not None
        return any(has_name(module, str(name)) for name in names or ())

    copies, rows = config.modules_to_save, config.trainable_token_indices
    for name, module in plain.named_modules():
        updates = is_adapter_layer(module)
        holds_rows = isinstance(module, TrainableTokensWrapper)
        holds_copy = isinstance(module, AuxiliaryTrainingWrapper) and not holds_rows
        if (
            ((holds_rows or holds_copy) and is_named(name, config.target_modules))
            or ((updates or holds_rows) and is_named(name, copies))
            or ((updates or holds_copy) and is_named(name, rows))
        ):
            raise ModelError(
                f"{who} and another adapter on the same weights change {name} in different ways (update, full copy, rows), which cannot be "
                "combined. Export the lower model merged (stages models export), and use that folder"
            )


def has_output_adapter(model: TransformersModel) -> bool:
    """Whether a low-rank adapter changes the output layer of ``model``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(plain_model(model).get_output_embeddings(), BaseTunerLayer)


def refuse_output_adapter(model: TransformersModel, lora: LoraSettings | None) -> None:
    """Raise ModelError for a low-rank adapter on the output layer if the trainer reads only that layer's own weight."""
    if lora is not None and has_output_adapter(model):
        name = module_name(plain_model(model), plain_model(model).get_output_embeddings()).rpartition(".")[2]
        raise ModelError(
            f"lora.target_modules={lora.target_modules!r} names the output layer {name}, whose adapter cannot be trained here (TRL reads "
            f"only the layer's own weight). Remove it, or train all its weights: lora.modules_to_save: [{name}]"
        )


def check_names(lora: LoraSettings, plain: PreTrainedModel, task: str) -> None:
    """Raise ModelError for a module name in ``lora`` that does not exist; peft would ignore it silently.

    A bare transformer has no output layer, so there a name that only the language model has is allowed.
    """
    modules = list(plain.named_modules())
    names = [name for name, _ in modules]
    if not isinstance(lora.target_modules, str):
        ends = tuple(f".{own}" for own in lora.target_modules)
        excluded = excluded_names(lora.exclude_modules)
        if passed := [one for one in unfit_products(plain) if f".{one}".endswith(ends) and not re.fullmatch(excluded, one)]:
            raise ModelError(
                f"lora.target_modules reaches {passed[0]} of {type(plain).__name__}: the model does not use this module as a plain linear "
                "layer (it reads the weight itself, or returns more than the product), so an adapter on it cannot work. "
                "Use 'all-linear', which excludes it, or name other modules"
            )
    is_bare, heads = task == "FEATURE_EXTRACTION", ("lm_head", "embed_out", "output_layer")
    for field, wanted in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        if isinstance(wanted, str):
            continue
        absent = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in names)]
        if is_bare and len(absent) < len(wanted) + (field == "modules_to_save"):
            absent = [one for one in absent if one.rpartition(".")[2] not in heads]
        if absent:
            kind = type(plain).__name__
            raise ModelError(f"lora.{field} names {', '.join(absent)}, which {kind} does not have. {linear_modules(plain)}")
    adaptable = [name for name, module in modules if isinstance(base_of(module), nn.Linear | Conv1D | nn.Embedding)]
    for one in [lora.exclude_modules] if isinstance(lora.exclude_modules, str) else lora.exclude_modules:
        pattern = excluded_names(lora.exclude_modules if isinstance(lora.exclude_modules, str) else [one])
        if not any(re.fullmatch(pattern, name) for name in adaptable) and not (is_bare and one.rpartition(".")[2] in heads):
            raise ModelError(
                f"lora.exclude_modules: {one!r} is no linear module and no embedding of {type(plain).__name__}, so it excludes nothing. "
                f"{linear_modules(plain)}. To exclude all modules in a module, write a regular expression, e.g. '.*\\.mlp\\..*'"
            )


def linear_modules(plain: PreTrainedModel) -> str:
    adapted = [name for name, module in plain.named_modules() if is_adapter_layer(module)]
    outside = {name: module for name, module in plain.named_modules() if not any(name.startswith(f"{layer}.") for layer in adapted)}
    linear = sorted({name.rpartition(".")[2] for name, module in outside.items() if isinstance(base_of(module), nn.Linear | Conv1D)})
    return f"Linear modules here: {', '.join(linear) or 'none'}; or use 'all-linear'"

"""Full copies of modules in an adapter (``modules_to_save``), and rows of the embedding (``new_rows``)."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.config import LoraSettings
from stages.errors import ModelError
from stages.models.adapters.activation import (
    wrappers_of,
)
from stages.models.adapters.checks import excluded_names, has_name
from stages.models.adapters.saved import SavedAdapter, is_tied, module_of
from stages.models.parts import module_name
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.utils.other import TrainableTokensWrapper
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel


def names_for_peft(names: Collection[str], plain: PreTrainedModel) -> list[str]:
    """Names for peft's ``modules_to_save``. peft also takes modules whose last part only ends with a name: input_layernorm for norm.

    A name for which it would do so is replaced by the full names of the modules. Raises ModelError if these are not enough.
    """
    modules = [module for module, _ in plain.named_modules()]
    made: list[str] = []
    for name in names:
        meant = [module for module in modules if has_name(module, name)]
        made += [name] if len(meant) == sum(module.endswith(name) for module in modules) else meant
    if further := [module for module in modules if module.endswith(tuple(made)) and not any(has_name(module, name) for name in names)]:
        raise ModelError(
            f"lora.modules_to_save={list(names)!r} also reaches {further[0]} of {type(plain).__name__}, because peft compares only the "
            f"ends of names. Name {further[0].rpartition('.')[2]}, too, or remove the name"
        )
    return made


def drop_other_copies(model: PeftModel, name: str, saved: SavedAdapter) -> None:
    """Remove the full copies of the adapter ``name`` that peft made only because a module's name ends with that of another.

    The saved adapter has no weights of them. A bare transformer has norm where a language model has model.norm, and input_layernorm.
    """
    from peft.utils.other import ModulesToSaveWrapper

    plain, stored = plain_model(model), [f"{module_of(key)}." for key in saved.weights]
    for path, wrapper in list(plain.named_modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        is_meant = any(has_name(path, one) for one in saved.config.modules_to_save or ())
        if is_meant or any(key.startswith(f"{path}.") for key in stored):
            continue
        wrapper.delete_adapter(name, None)
        if not wrapper.modules_to_save:
            plain.set_submodule(path, wrapper.original_module)


def rows_to_train(plain: PreTrainedModel, lora: LoraSettings, new_rows: Collection[int]) -> dict[str, list[int]] | None:
    """peft's ``trainable_token_indices``: rows by module name; None if no rows are trained.

    For tied weights the embedding is sufficient, because peft ties the output layer to it. Raises ModelError if the rows cannot be trained.
    """
    if not new_rows:
        return None
    embedding, output = plain.get_input_embeddings(), plain.get_output_embeddings()
    matrices = [embedding] if output is None or is_tied(plain) else [embedding, output]
    names = [module_name(plain, matrix) for matrix in matrices]
    saved = [name for name in names if any(name == one or name.endswith(f".{one}") for one in lora.modules_to_save)]
    advice = f"put both into lora.modules_to_save: [{', '.join(name.rpartition('.')[2] for name in names)}]"
    if saved == names and (len(names) > 1 or output is None):
        return None  # all their rows are trained
    if output is not None and is_tied(plain):
        advice = f"remove {names[0].rpartition('.')[2]} from lora.modules_to_save, or train without lora"
    problem = ""
    if saved:
        problem = f"{saved[0]} is trained as a full copy, which the tied output layer would not share"
    elif _has_adapter(plain, embedding, lora) or (output is not None and _has_adapter(plain, output, lora)):
        problem, advice = "lora.target_modules puts an adapter on their matrix", "remove the embedding and the output layer from it"
    elif output is not None and getattr(output, "bias", None) is not None:
        problem = "the output layer has a bias, which peft drops"
    if problem:
        raise ModelError(
            f"the tokenizer has {len(new_rows)} tokens without embedding rows, which cannot be trained with lora: {problem}. "
            f"To fix: {advice}"
        )
    return dict.fromkeys(names, sorted(new_rows))


def _has_adapter(plain: PreTrainedModel, module: nn.Module, lora: LoraSettings) -> bool:
    """Whether ``lora.target_modules`` includes this module."""
    name = module_name(plain, module)
    if re.fullmatch(excluded_names(lora.exclude_modules), name):
        return False
    if isinstance(lora.target_modules, str):
        return lora.target_modules != "all-linear" and re.fullmatch(lora.target_modules, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in lora.target_modules)


def copy_active_modules(model: TransformersModel, name: str) -> None:
    """Initialize full copies in the new adapter ``name`` from the active adapter below it. peft copies the base's modules instead."""
    for wrapper in wrappers_of(model):
        modules = getattr(wrapper, "modules_to_save", None)
        active = [other for other in wrapper.active_adapters if other != name]
        if modules is not None and name in modules and active and active[-1] in modules:
            modules[name].load_state_dict(modules[active[-1]].state_dict())


def prepare_wrappers(model: TransformersModel, name: str) -> None:
    """Fix peft's wrappers of full module copies and rows after adding the adapter ``name``.

    Full copies are fp32 while they are trained, but their base may be bf16. Let them compute in their own dtype and return the base's dtype
    (logits stay fp32). Under autocast nothing changes.
    """
    from peft.utils.other import TrainableTokensWrapper

    for wrapper in wrappers_of(model):
        if type(wrapper) is TrainableTokensWrapper:
            wrapper.__class__ = _rows_of_some()
        modules = getattr(wrapper, "modules_to_save", None)
        weight = next(wrapper.original_module.parameters(), None)
        if modules is None or name not in modules or weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        modules[name].register_forward_pre_hook(_cast_inputs)
        if not isinstance(modules[name], nn.Linear):
            modules[name].register_forward_hook(partial(_cast_output, dtype=weight.dtype))


@cache
def _rows_of_some() -> type[TrainableTokensWrapper]:
    """peft's row wrapper for models in which only some adapters have rows. peft itself saves and loads rows for all adapters."""
    from peft.utils.other import TrainableTokensWrapper

    class RowsOfSome(TrainableTokensWrapper):
        bias = None  # peft hides the layer's bias, which TRL's loss reads; output layers with a bias are refused

        def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
            return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._get_available_adapters() else {}

        # peft's base class of wrappers has the method without ``state_dict``
        def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._get_available_adapters() else {}

    return RowsOfSome


def _cast_inputs(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    if torch.is_autocast_enabled(next(module.parameters()).device.type):
        return inputs
    dtype = next(module.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)


def _cast_output(module: nn.Module, inputs: tuple[object, ...], output: object, *, dtype: torch.dtype) -> object:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output

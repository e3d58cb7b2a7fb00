"""The adapters of a PeftModel: their layers and parameters, and which of them are active."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard
from weakref import WeakKeyDictionary

from torch import nn

from stages.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from stages.model_types import TransformersModel

NEW_ADAPTER = "default"
"""Name of the adapter that the current step trains."""
ACTIVE = "_stages_active"
"""Attribute of a PeftModel: the names of its active adapters, lowest first."""


def adapted(model: nn.Module) -> PeftModel:
    """``model`` itself, which must be a PeftModel."""
    from peft import PeftModel

    assert isinstance(model, PeftModel), f"{type(model).__name__} has no adapters"
    return model


def lora_config(model: PeftModel, name: str) -> LoraConfig:
    """The config of the adapter ``name``."""
    from peft import LoraConfig

    config = model.peft_config[name]
    assert isinstance(config, LoraConfig)
    return config


def is_part_of(parameter: str, adapter: str) -> bool:
    """Whether the parameter with this name belongs to the adapter."""
    return adapter in parameter.split(".")


def active_adapters(model: TransformersModel) -> tuple[str, ...]:
    """The active adapters, lowest first; empty for a model without adapters."""
    return getattr(model, ACTIVE, ())


def activate(model: PeftModel, names: Sequence[str], *, trainable: Sequence[str] | None = None) -> None:
    """Make exactly ``names`` (lowest first) the active adapters; an empty list selects the bare base.

    ``trainable``: the adapters to train (None: unchanged). If several adapters contain a copy of one module, the highest one is used.

    PPO calls this several times per pass. So it changes the two attributes of each layer that decide, instead of calling peft's methods:
    those also make exactly the active adapters trainable, while here several roles train, of which only one is active at a time.
    """
    layers, wrappers = _switched(model, again=trainable is not None)
    for layer in layers:
        layer._disable_adapters = not names
        if names:
            layer._active_adapter = list(names)
    flags = [(parameter, parameter.requires_grad) for wrapper in wrappers for parameter in wrapper.parameters()]
    for wrapper in wrappers:
        _activate_copies(wrapper, names)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    setattr(model, ACTIVE, tuple(names))
    if trainable is None:
        return
    for name, parameter in model.named_parameters():
        of = next((adapter for adapter in model.peft_config if is_part_of(name, adapter)), None)
        if of is not None:
            parameter.requires_grad_(of in trainable)


_switchable: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], list[BaseTunerLayer], list[AuxiliaryTrainingWrapper]]] = (
    WeakKeyDictionary()
)  # by model: names of its adapters, and the parts that ``activate`` switches


def _switched(model: PeftModel, *, again: bool) -> tuple[list[BaseTunerLayer], list[AuxiliaryTrainingWrapper]]:
    """The layers with low-rank updates, and the modules with copies. The search takes milliseconds, so its result is kept.

    ``again``: search again, because adapters may have been added or removed.
    """
    names, layers, wrappers = _switchable.get(model, ((), [], []))
    if again or names != tuple(model.peft_config):
        names = tuple(model.peft_config)
        layers, wrappers = [module for module in model.modules() if is_adapter_layer(module)], wrappers_of(model)
        _switchable[model] = names, layers, wrappers
    return layers, wrappers


def _activate_copies(wrapper: AuxiliaryTrainingWrapper, names: Sequence[str]) -> None:
    """Select the copies of ``names`` in a wrapper of full modules or rows."""
    own = [name for name in names if name in wrapper._get_available_adapters()]
    if (tokens := getattr(wrapper, "token_adapter", None)) is not None:
        own = [name for index, name in enumerate(own) if not _is_covered(tokens, name, own[index + 1 :])]
    wrapper.set_adapter(own if tokens is not None else own[-1:])
    wrapper.enable_adapters(bool(own))


def _is_covered(tokens: TrainableTokensLayer, name: str, above: Sequence[str]) -> bool:
    """Whether higher adapters contain all rows of the adapter ``name``. Raises ModelError if they contain only some of them."""
    rows = set(tokens.token_indices[name])
    others = {row for other in above for row in tokens.token_indices[other]}
    if rows & others and not rows <= others:
        raise ModelError("two adapters of one stack train overlapping rows of the embedding, which peft cannot combine; merge one of them")
    return bool(rows & others)


def is_adapter_layer(module: nn.Module) -> TypeGuard[BaseTunerLayer]:
    """Whether ``module`` has low-rank updates."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def wrappers_of(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """Modules that contain copies per adapter: full modules or rows."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


@contextmanager
def without_new_adapter(model: TransformersModel) -> Iterator[None]:
    """Context manager that deactivates the new adapter, so that the model computes what it did before training."""
    acting = active_adapters(model)
    activate(adapted(model), [name for name in acting if name != NEW_ADAPTER])
    try:
        yield
    finally:
        activate(adapted(model), acting)


@contextmanager
def without_copies(model: TransformersModel) -> Iterator[None]:
    """Context manager that removes adapters added by a library, and restores the active ones."""
    known, acting = set(getattr(model, "peft_config", {})), active_adapters(model)
    trainable = [name for name in acting if any(p.requires_grad for key, p in model.named_parameters() if is_part_of(key, name))]
    yield
    added = set(getattr(model, "peft_config", {})) - known
    for name in added:
        remove_adapter(adapted(model), name)
    if added:
        activate(adapted(model), acting, trainable=trainable)


def remove_adapter(model: PeftModel, name: str) -> None:
    """Remove an adapter from a PeftModel that has others. One of the others becomes active."""
    activate(model, [other for other in model.peft_config if other != name][-1:])  # peft deletes an adapter only if at most one is active
    model.delete_adapter(name)
    _switchable.pop(model, None)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress peft warnings that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
        for message in (
            "fan_in_fan_out is set to",  # peft then sets the right value itself
            "The PEFT config's `base_model_name_or_path` was renamed",  # the registry names bases by digest
            "Model with `tie_word_embeddings=True` and",  # `merge` unties them
            "Model has `tie_word_embeddings=True` and",
            "Input and output embeddings are no longer tied",
        ):
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield

"""Dropout on residual branches only (Ouyang et al. 2022, C.1: 0.2 in supervised fine-tuning), for any decoder family; and no dropout.

Many families lack the dropout modules that GPT had. Forward hooks therefore apply dropout to the branch outputs. Weights, modules and
names do not change, so the saved model is the same.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.nn import functional

from stages.errors import ModelError
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

BRANCHES = ("self_attn", "self_attention", "attn", "attention", "mlp", "feed_forward", "ffn", "fc2")
RESIDUAL = "residual_dropout"  # attribute of a branch: its dropout probability
WITHOUT_DROPOUT = "without_config_dropout"  # attribute of a module: its config's dropout probabilities are 0 during its pass


def set_residual_dropout(model: TransformersModel, probability: float) -> int:
    """Apply dropout to the output of each attention and MLP in training mode, and set every other dropout to 0.

    Returns the number of branches. Raises ModelError for a model whose layers do not have exactly two.
    """
    disable_dropout(model)
    plain = plain_model(model)
    count = 0
    for layer in _layers(plain):
        branches = [child for name, child in layer.named_children() if name in BRANCHES]
        if len(branches) != 2:
            names = ", ".join(name for name, _ in layer.named_children())
            raise ModelError(
                f"residual_dropout: a layer of {type(plain).__name__} has the parts {names}; expected exactly one attention and one MLP "
                "among them. Remove residual_dropout for this family"
            )
        for branch in branches:
            setattr(branch, RESIDUAL, probability)
            branch.register_forward_hook(_drop)
            count += 1
    return count


def has_dropout(model: nn.Module) -> bool:
    """Whether passes of ``model`` in training mode are random: dropout in modules, attention or branches, or noise in a router."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        if any(getattr(module, name) > 0 for name in _probabilities(module)) or _has_jitter(module):
            return True
        if _read_from_config(module) and not hasattr(module, WITHOUT_DROPOUT):
            return True
    return False


def _layers(model: TransformersModel) -> nn.ModuleList:
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ModelError(f"residual_dropout: {type(model).__name__} has no list of all its layers; remove residual_dropout")


def _drop(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Forward hook of a branch: apply dropout to its output (the first item of a tuple)."""
    if not module.training:
        return output
    if isinstance(output, tuple):
        return (functional.dropout(output[0], getattr(module, RESIDUAL)), *output[1:])
    return functional.dropout(output, getattr(module, RESIDUAL))


def disable_dropout(model: nn.Module) -> None:
    """Make every pass in training mode compute what evaluation mode computes. The config is not changed, so the saved model is the same.

    Every dropout probability becomes 0, also that of whole layers (``layerdrop``). Mixtures of experts that add noise to their input or
    sample their experts during training (Mixtral's and Dbrx's jitter, PhiMoE's sparsemixer) stay in evaluation mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _probabilities(module):
            setattr(module, name, 0.0)
        if (names := _read_from_config(module)) and not hasattr(module, WITHOUT_DROPOUT):
            _zero_during_pass(module, names)
        if _has_jitter(module):
            kind: Any = type(module)
            module.__class__ = _always_evaluating(kind)
            module.eval()


def _probabilities(module: nn.Module) -> list[str]:
    """Names of the module's dropout probabilities. Attention modules pass such a float to scaled_dot_product_attention."""
    return [name for name, value in vars(module).items() if ("dropout" in name or name == "layerdrop") and isinstance(value, float)]


def _read_from_config(module: nn.Module) -> list[str]:
    """Names of dropout probabilities above 0 that a module reads from its config in every pass (Falcon, Persimmon)."""
    kind: Any = type(module)  # Any, because mypy takes classes of modules for unhashable
    config = getattr(module, "config", None)
    return [name for name in _config_fields(kind) if isinstance(value := getattr(config, name, None), float) and value > 0]


@cache
def _config_fields(kind: type[nn.Module]) -> tuple[str, ...]:
    """The dropout fields of the config that methods of a module class read, by their source; those that only ``__init__`` reads not."""
    names: set[str] = set()
    for one in kind.__mro__:
        if one is nn.Module:
            break
        for name, method in vars(one).items():
            if name != "__init__" and inspect.isfunction(method):
                with suppress(OSError, TypeError):  # a class that was made at run time has no source
                    names |= set(re.findall(r"\bself\.config\.(\w*drop\w*)", inspect.getsource(inspect.unwrap(method))))
    return tuple(sorted(names))


def _zero_during_pass(module: nn.Module, names: list[str]) -> None:
    """Make the config's fields ``names`` 0 during each pass of ``module``. Outside, and in the saved config, they keep their values."""
    kept: list[dict[str, float]] = []  # a stack, because gradient checkpointing repeats passes

    def before(module: nn.Module, *_: object) -> None:
        kept.append({name: getattr(module.config, name) for name in names})
        for name in names:
            setattr(module.config, name, 0.0)

    def after(module: nn.Module, *_: object) -> None:
        for name, value in kept.pop().items():
            setattr(module.config, name, value)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
    setattr(module, WITHOUT_DROPOUT, True)


def _has_jitter(module: nn.Module) -> bool:
    """Whether the module is a router, or contains one, whose choice of experts has noise in training mode."""
    if isinstance(module, _AlwaysEvaluating):
        return False
    return any("jitter" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


class _AlwaysEvaluating(nn.Module):
    """Mixin for a module that stays in evaluation mode when its model is set to training mode."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


@cache
def _always_evaluating(kind: Any) -> type[nn.Module]:  # Any, because mypy takes classes of modules for unhashable
    """The class ``kind`` in evaluation mode. It keeps the name, because configs refer to classes by name."""
    return type(kind.__name__, (_AlwaysEvaluating, kind), {"__module__": kind.__module__})

"""Replace a loaded model's norms and feed-forward layers by versions that store fewer activations (``kernels/lean.py``).

Each family in transformers has its own copy of the same two layers. A layer is replaced in two steps. First its structure is checked: its
parts, its activation, the arguments of ``forward``. Then both versions are compared on random weights and inputs of several scales, in
training and evaluation mode. The model's current weights are not used, because near 0 a GELU looks like a SiLU. Parameters, names and the
saved form do not change.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Hashable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.kernels.lean import fused_rms_norm, fuses_norm, gated_mlp, rms_norm
from stages.kernels.matmul import Linear, are_plain
from stages.sampling.support import PASS_FAILURES, weight_of

PRODUCTS = ("gate_proj", "up_proj", "down_proj")
EPSILONS = ("variance_epsilon", "eps")
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "hidden_act")
PROBE_SIZES = (1e-3, 1.0, 30.0)
"""Scales of the probe inputs: a small one reveals a norm's epsilon, a large one the shape of an activation."""


def use_lean_layers(model: nn.Module) -> Counter[str]:
    """Replace the RMS norms and SwiGLU layers of ``model``. The new versions are used when training in fp32 on a CPU; norms also on a GPU.

    Returns the number of replaced layers per class.
    """
    lean_classes: dict[Hashable, type[_LeanNorm] | type[_LeanMLP] | None] = {}
    switched: Counter[str] = Counter()
    for module in model.modules():
        key = _alike(module)
        if key not in lean_classes:
            kind: type = type(module)
            lean_classes[key] = next((lean for lean in _lean_classes(kind) if _is_equal(module, lean)), None)
        if (lean := lean_classes[key]) is not None:
            switched[type(module).__name__] += 1
            module.__class__ = lean
    return switched


class _LeanNorm(nn.Module):
    """Mixin for a family's RMS norm: weight * x / sqrt(mean(x^2) + eps)."""

    weight: Tensor

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the layer has exactly one weight, an epsilon, and no submodules."""
        names = [name for name, _ in module.named_parameters()]
        return names == ["weight"] and next(module.parameters()).ndim == 1 and _epsilon(module) is not None and not list(module.children())

    @staticmethod
    def can_be_lean(module: nn.Module) -> bool:
        """Whether the present parts of a replaced layer allow the lean version."""
        return True

    def lean(self: nn.Module, x: Tensor) -> Tensor:
        epsilon = _epsilon(self)
        assert epsilon is not None  # checked by ``fits``
        return rms_norm(x, weight_of(self), epsilon)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        if len(inputs) == 1 and not named:
            if fuses_norm(inputs[0], self.weight):
                epsilon = _epsilon(self)
                assert epsilon is not None  # checked by ``fits``
                return fused_rms_norm(inputs[0], self.weight, epsilon)
            if torch.is_grad_enabled() and are_plain(inputs[0], self.weight):
                return self.lean(inputs[0])
        return super().forward(*inputs, **named)


class _LeanMLP(nn.Module):
    """Mixin for a family's feed-forward layer. If one of its linear modules has an adapter, the family's own forward runs."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the layer has the three linear modules, no other parameters, and only SiLU activations."""
        named = [getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))]
        parameters = {name for name, _ in module.named_parameters()}
        return _has_plain_products(module) and parameters == {f"{name}.weight" for name in PRODUCTS} and all(map(_is_silu, named))

    @staticmethod
    def can_be_lean(module: nn.Module) -> bool:
        """Whether the present parts of a replaced layer allow the lean version: its linear modules have no adapters."""
        return _has_plain_products(module)

    def lean(self: nn.Module, x: Tensor) -> Tensor:
        return gated_mlp(x, *(getattr(self, name).weight for name in PRODUCTS))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        weights = (getattr(self, name).weight for name in PRODUCTS)
        takes = len(inputs) == 1 and not named and torch.is_grad_enabled() and self.can_be_lean(self) and are_plain(inputs[0], *weights)
        return self.lean(inputs[0]) if takes else super().forward(*inputs, **named)


def _epsilon(module: nn.Module) -> float | None:
    epsilons = [value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return epsilons[0] if len(epsilons) == 1 else None


def _is_silu(activation: object) -> bool:
    """Whether an activation is SiLU, x * sigmoid(x), by its identity or class, not by its values."""
    return activation is functional.silu or isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _has_plain_products(module: nn.Module) -> bool:
    products = [getattr(module, name, None) for name in PRODUCTS]
    return all(
        isinstance(one, nn.Linear) and type(one) in (nn.Linear, Linear) and one.bias is None and not one._forward_hooks for one in products
    )


def _alike(module: nn.Module) -> Hashable:
    """A key that is equal for layers which compute the same function of their weights: the class and its scalar settings."""
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in ("layer_idx", "training")
    )
    activations = tuple(type(getattr(module, name, None)) for name in ACTIVATIONS)
    return (type(module), settings, activations, tuple(name for name, _ in module.named_parameters()))


@cache
def _lean_classes(kind: type[nn.Module]) -> tuple[type[_LeanNorm] | type[_LeanMLP], ...]:
    """Candidate lean classes for layers of this class. They keep the original class name, because configs refer to classes by name."""
    if issubclass(kind, (_LeanNorm, _LeanMLP)) or not _takes_one_tensor(kind):
        return ()
    return tuple(type(kind.__name__, (mixin, kind), {"__module__": kind.__module__}) for mixin in (_LeanNorm, _LeanMLP))


def _takes_one_tensor(kind: type[nn.Module]) -> bool:
    """Whether ``forward`` has exactly one argument; a gate or mask argument would change the result."""
    return len(inspect.signature(kind.forward).parameters) == 2


@torch.no_grad()
def _is_equal(module: nn.Module, lean: type[_LeanNorm] | type[_LeanMLP]) -> bool:
    """Whether ``lean`` and ``module`` compute the same outputs for random weights and inputs."""
    if not lean.fits(module):
        return False
    on_gpu = issubclass(lean, _LeanNorm) and torch.cuda.is_available()
    if next(module.parameters()).dtype != torch.float32 and not on_gpu:
        return False
    probe = _with_drawn_weights(module)
    generator = torch.Generator().manual_seed(1)
    width = next(module.parameters()).shape[-1]
    x = torch.cat([torch.randn(4, width, generator=generator) * size for size in PROBE_SIZES])
    try:
        return all(torch.allclose(lean.lean(probe, x), probe.train(training)(x), rtol=1e-4, atol=1e-6) for training in (True, False))
    except PASS_FAILURES:
        return False


def _with_drawn_weights(module: nn.Module) -> nn.Module:
    """A copy of a layer on the CPU with weights drawn from [-1.5, 1.5]. All rows of a matrix are views of one drawn row, to save memory.

    Matrix rows are scaled so that outputs have about the same scale as inputs.
    """
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, object] = {}
    for parameter in module.parameters():
        row = torch.rand(parameter.shape[-1], generator=generator) * 3 - 1.5
        if parameter.ndim == 2:
            row = (row / parameter.shape[-1] ** 0.5).expand(parameter.shape)
        drawn[id(parameter)] = nn.Parameter(row, requires_grad=False)
    return copy.deepcopy(module, drawn)

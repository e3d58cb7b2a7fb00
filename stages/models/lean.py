"""A loaded model's norms and feed-forward layers replaced by such as keep less for their backward pass (``numerics/lean.py``).

transformers writes the same two layers anew in every family. Which of a model's they are is found by computing: a layer that has the
parts, and makes of random numbers what the lean one makes. Parameters, names and saved form stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stages.numerics.lean import gated_mlp, rms_norm
from stages.numerics.matmul import Linear, are_plain

PRODUCTS = ("gate_proj", "up_proj", "down_proj")


def use_lean_layers(model: nn.Module) -> None:
    """Let the RMS norms and SwiGLU layers of ``model`` compute leanly wherever they train in fp32 on a CPU."""
    found: dict[type[nn.Module], type[nn.Module] | None] = {}
    for module in model.modules():
        kind: Any = type(module)
        if kind not in found:
            found[kind] = next((lean for lean in _leaner(kind) if _is_equal(module, lean)), None)
        if (lean := found[kind]) is not None:
            module.__class__ = lean


class _LeanNorm(nn.Module):
    """Mixed into a family's own RMS norm."""

    weight: Tensor
    variance_epsilon: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return isinstance(getattr(module, "weight", None), Tensor) and isinstance(getattr(module, "variance_epsilon", None), float)

    def lean(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.lean(x) if torch.is_grad_enabled() and are_plain(x, self.weight) else super().forward(x)


class _LeanMLP(nn.Module):
    """Mixed into a family's own feed-forward layer; with an adapter on one of its products it stays as it is written."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return _has_plain_products(module)

    def lean(self, x: Tensor) -> Tensor:
        return gated_mlp(x, *(getattr(self, name).weight for name in PRODUCTS))

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and _has_plain_products(self)
        weights = (getattr(self, name).weight for name in PRODUCTS)
        return self.lean(x) if trains and are_plain(x, *weights) else super().forward(x)


def _has_plain_products(module: nn.Module) -> bool:
    products: list[Any] = [getattr(module, name, None) for name in PRODUCTS]
    return all(type(one) in (nn.Linear, Linear) and one.bias is None and not one._forward_hooks for one in products)


@cache
def _leaner(kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """Lean forms that layers of this class could have. Their class has the name of the one it stands for, as configs name classes."""
    if issubclass(kind, (_LeanNorm, _LeanMLP)):
        return ()
    return tuple(type(kind.__name__, (mixin, kind), {"__module__": kind.__module__}) for mixin in (_LeanNorm, _LeanMLP))


@torch.no_grad()
def _is_equal(module: Any, lean: Any) -> bool:
    """Whether ``lean`` computes what ``module`` computes, on a few random numbers."""
    if not lean.fits(module):
        return False
    weight = getattr(module, "weight", None)
    width = len(weight) if isinstance(weight, Tensor) else module.gate_proj.in_features
    dtype = next(module.parameters()).dtype
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        return dtype == torch.float32 and torch.allclose(lean.lean(module, x), module(x), rtol=1e-4, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False

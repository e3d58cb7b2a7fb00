"""Layers of current transformers that store less for the backward pass and need fewer steps. fp32; d hidden, i intermediate.

Autograd stores the operands of every single operation of a layer. These layers store only their input and what is expensive to recompute.
Gradients are equal up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.kernels.matmul import Context, linear, product


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019), differentiable. Stores x."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = upstream
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        of_weight = (gradient * normed).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_x = gradient * weight
        along = torch.linalg.vecdot(of_x, normed).div_(-x.shape[-1]).unsqueeze(-1)  # the component removed by the normalization
        return of_x.addcmul_(normed, along).mul_(scale), of_weight, None


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T (Shazeer 2020, SwiGLU), differentiable. Stores x and the first two products.

    x [..., d], gate and up [i, d], down [d, i].
    """
    return _GatedMLP.apply(x, gate, up, down)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gated, upped = linear(flat, gate), linear(flat, up)
        ctx.save_for_backward(flat, gated, upped, gate, up, down)
        # Not a view for autograd, because Llama 4 adds to the result in place.
        return torch.ops.aten._unsafe_view(linear(functional.silu(gated).mul_(upped), down), [*x.shape[:-1], len(down)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, gated, upped, gate, up, down = ctx.saved_tensors
        shape = (*upstream[0].shape[:-1], flat.shape[-1])
        gradient = upstream[0].reshape(-1, len(down))
        wants_x, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        inner = product(gradient, down)
        silu = functional.silu(gated)
        of_down = product(gradient.T, silu * upped) if wants_down else None
        of_upped = silu.mul_(inner)
        of_gated = torch.ops.aten.silu_backward(inner.mul_(upped), gated)
        of_x = product(of_gated, gate).add_(product(of_upped, up)).view(shape) if wants_x else None
        of_gate = product(of_gated.T, flat) if wants_gate else None
        of_up = product(of_upped.T, flat) if wants_up else None
        return of_x, of_gate, of_up, of_down

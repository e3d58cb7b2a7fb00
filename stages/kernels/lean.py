"""Layers of current transformers that store less for the backward pass and need fewer steps. fp32; d hidden, i intermediate.

Autograd stores the operands of every single operation of a layer. These layers store only their input and what is expensive to recompute.
Gradients are equal up to rounding.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import is_out_of_memory
from stages.kernels.matmul import PLAIN, Context, linear, product

logger = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [d] * x [..., d] / sqrt(mean(x^2) + eps) over d (Zhang and Sennrich 2019), differentiable. Stores x."""
    return _RMSNorm.apply(x, weight, eps)


def fuses_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether ``fused_rms_norm`` computes this norm: on a GPU, in the dtype of the weight. torch.compile fuses a norm itself."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return type(x) in PLAIN and type(weight) in PLAIN and weight.dtype == x.dtype and not _problem_of_fused_norm(x.dtype)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in one operation of a GPU, and one in the backward pass; the families' own norms have 8 and more. Stores x.

    It is the operator behind torch.nn.functional.rms_norm, which autocast would give inputs and outputs in fp32.
    """
    made: Tensor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)[0]
    return made


@cache
def _problem_of_fused_norm(dtype: torch.dtype) -> str:
    """Why the operator is not used on this machine's GPU; empty if outputs and gradients are those of ``rms_norm``."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in ((6, 64), (64,), (6, 64))]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    reason = ""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            made = []
            for norm, kind in ((rms_norm, torch.float32), (fused_rms_norm, dtype)):
                x, weight, upstream = (one.to("cuda", dtype).to(kind) for one in values)
                x.requires_grad_(), weight.requires_grad_()
                output = norm(x, weight, 1e-6)
                made.append([output, *torch.autograd.grad(output, (x, weight), upstream)])
        for expected, own in zip(*made, strict=True):
            if own.dtype != dtype or not bool((own.float() - expected).norm() <= tolerance * expected.norm()):
                reason = "its outputs or gradients differ"
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if reason:
        logger.warning("norms are computed by several operations, because PyTorch's fused norm is not used in %s: %s", dtype, reason)
    return reason


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

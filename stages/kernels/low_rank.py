"""Linear layers with low-rank updates (LoRA), computed together if they read the same input.

Autograd, layer by layer, needs two small products, a scaling and a sum for each update, and casts the input again for each. Here the update
matrices of all layers with the same input are stacked, so that one product serves all of them, and sums and scalings are parts of products.

K parts of the tokens, each with its own adapters (usually 1); S tokens per part, d inputs, o outputs, r rank of an update, R the sum of the
ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.kernels.casts import cast, kept
from stages.kernels.matmul import add_product_, linear, product, scaled_product


@dataclass(frozen=True, slots=True)
class Update:
    """The update of a layer by one adapter: scaling * (x a^T) b^T. a [r, d], b [o, r]."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class UpdatedLayer:
    """A linear layer and its updates: for each part of the tokens, those of its adapters, lowest first.

    The base is either a frozen ``weight`` [o, d] with an optional frozen ``bias`` [o], or its ``output`` [..., o] (e.g. of a quantized
    layer), which has its own gradient.
    """

    parts: tuple[tuple[Update, ...], ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    output: Tensor | None = None

    @property
    def rank(self) -> int:
        """The largest sum of ranks of a part."""
        return max(sum(update.a.shape[0] for update in part) for part in self.parts)

    @property
    def scaling(self) -> float:
        """The scaling of the highest adapter. It is applied to products; the others are applied to b, relative to it."""
        return next((part[-1].scaling for part in self.parts if part), 1.0)


def updated_layers(x: Tensor, layers: Sequence[UpdatedLayer], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs [..., o] of ``layers`` for one input ``x`` [..., d], differentiable. Products are computed in ``dtype``.

    The tokens of ``x`` are divided into K equal parts, in order. A layer with a weight returns ``dtype``, the others the dtype of their
    output. At least one layer must have an update.
    """
    outputs = [layer.output for layer in layers if layer.output is not None]
    factors = [factor for layer in layers for part in layer.parts for update in part for factor in (update.a, update.b)]
    plans = [_Plan(layer.parts, layer.weight, layer.bias, layer.rank, layer.scaling) for layer in layers]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *outputs, *factors)):
        return _UpdatedLayers.apply(x, plans, dtype, *outputs, *factors)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, plans, outputs, dtype)[0]


@dataclass(frozen=True, slots=True)
class _Plan:
    """An ``UpdatedLayer`` without its output, which must not be kept until the backward pass."""

    parts: tuple[tuple[Update, ...], ...]
    weight: Tensor | None
    bias: Tensor | None
    rank: int
    scaling: float


def _forward(
    x: Tensor, plans: Sequence[_Plan], outputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (outputs, x [K, S, d], x a^T [K, S, R], stacked a [K, R, d], stacked b of each layer [K, o, rank])."""
    num_parts = len(plans[0].parts)
    flat = _flat(x, dtype)
    tokens = _divided(flat, num_parts)
    a, bs = _stacked_a(plans, dtype), [_stacked_b(plan, dtype) for plan in plans]
    low = _products(tokens, a.transpose(1, 2))
    waiting, results, start = list(outputs), [], 0
    for plan, b in zip(plans, bs, strict=True):
        own = low[..., start : start + plan.rank]
        start += plan.rank
        if plan.weight is not None:
            bias = None if plan.bias is None else cast(plan.bias, dtype)
            result = linear(flat, cast(plan.weight, dtype), bias)
            result = _divided(result, num_parts)
            _add_low_rank_(result, own, b, plan.scaling)
        else:
            base = waiting.pop(0)
            result = _divided(_flat(base, base.dtype), num_parts) + _products(own, b.transpose(1, 2), plan.scaling)
            result = result.to(base.dtype)
        # Not a view for autograd, because a model may change the result in place.
        results.append(torch.ops.aten._unsafe_view(result, [*x.shape[:-1], b.shape[1]]))
    return tuple(results), tokens, low, a, bs


class _UpdatedLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plans: list[_Plan], dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_outputs = sum(plan.weight is None for plan in plans)
        with torch.autocast(x.device.type, enabled=False):
            results, tokens, low, ctx.a, ctx.bs = _forward(x, plans, tensors[:num_outputs], dtype)
        ctx.plans, ctx.num_outputs, ctx.shape, ctx.dtype = plans, num_outputs, x.shape, x.dtype
        wanted = ctx.needs_input_grad[3 + num_outputs :]
        ctx.save_for_backward(tokens if any(wanted[::2]) else None, low if any(wanted[1::2]) else None)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[object, ...]:
        given = next((gradient for gradient in upstream if gradient is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(given.device.type, enabled=False):
            return _backward(ctx, upstream)


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[object, ...]:
    plans, a, bs = ctx.plans, ctx.a, ctx.bs
    tokens, low = ctx.saved_tensors
    num_parts, wanted = len(a), list(ctx.needs_input_grad[3 + ctx.num_outputs :])
    gradients = [None if one is None else _divided(_flat(one, a.dtype), num_parts) for one in upstream]
    size = next(one.shape[1] for one in gradients if one is not None)
    of_low = [
        a.new_zeros(num_parts, size, plan.rank) if gradient is None else _products(gradient, b, plan.scaling)
        for plan, gradient, b in zip(plans, gradients, bs, strict=True)
    ]
    low_gradient = of_low[0] if len(of_low) == 1 else torch.cat(of_low, dim=-1)
    of_x = None
    if ctx.needs_input_grad[0]:
        of_x = _input_gradient(plans, gradients, low_gradient, a).reshape(ctx.shape).to(ctx.dtype)
    of_a = None
    if tokens is not None:
        weights = next(update.a.dtype for plan in plans for part in plan.parts for update in part)
        of_a = _products(low_gradient.transpose(1, 2), tokens).to(weights)  # one cast for all
    of_factors: list[Tensor | None] = []
    start = 0
    for plan, gradient in zip(plans, gradients, strict=True):
        of_b = None
        if low is not None and gradient is not None:
            of_b = _products(gradient.transpose(1, 2), low[..., start : start + plan.rank], plan.scaling)
        for index, part in enumerate(plan.parts):
            column = 0
            for update in part:
                end = column + update.a.shape[0]
                of_factors.append(None if of_a is None else of_a[index, start + column : start + end].to(update.a.dtype))
                of_factors.append(None if of_b is None else _unscaled(of_b[index, :, column:end], update, plan.scaling))
                column = end
        start += plan.rank
    of_factors = [one if wants else None for one, wants in zip(of_factors, wanted, strict=True)]
    of_outputs = [gradient for gradient, plan in zip(upstream, plans, strict=True) if plan.weight is None]
    return of_x, None, None, *of_outputs, *of_factors


def _input_gradient(plans: Sequence[_Plan], gradients: Sequence[Tensor | None], of_low: Tensor, a: Tensor) -> Tensor:
    """Gradient of the input [K, S, d], without the part that flows through the bases' outputs."""
    summed: Tensor | None = None
    for plan, gradient in zip(plans, gradients, strict=True):
        if plan.weight is None or gradient is None:
            continue
        weight, flat = cast(plan.weight, a.dtype), gradient.flatten(0, 1)
        if summed is None:
            summed = product(flat, weight)
        else:
            add_product_(summed, flat, weight)
    if summed is None:
        return _products(of_low, a)
    if a.shape[0] > 1:
        _divided(summed, len(a)).baddbmm_(of_low, a)
    else:
        add_product_(summed, of_low[0], a[0])
    return summed


def _unscaled(of_b: Tensor, update: Update, scaling: float) -> Tensor:
    """The gradient of an adapter's b from that of the stacked b, to which other scalings were applied relative to ``scaling``."""
    return (of_b if update.scaling == scaling else of_b * (update.scaling / scaling)).to(update.b.dtype)


def _stacked_a(plans: Sequence[_Plan], dtype: torch.dtype) -> Tensor:
    """The a of all updates [K, R, d], layer by layer; zeros where a part has fewer than others."""
    num_parts = len(plans[0].parts)
    updates = [update for index in range(num_parts) for plan in plans for update in plan.parts[index]]
    if num_parts == 1 and len(updates) == 1:
        return cast(updates[0].a, dtype)[None]
    template = updates[0].a

    def make() -> Tensor:
        blocks: list[Tensor] = []
        for index in range(num_parts):
            for plan in plans:
                own = [update.a for update in plan.parts[index]]
                missing = plan.rank - sum(one.shape[0] for one in own)
                blocks += [*own, template.new_zeros(missing, template.shape[1])] if missing else own
        return torch.cat(blocks).to(dtype).view(num_parts, -1, template.shape[1])

    form = ("a", dtype, tuple(tuple(len(part) for part in plan.parts) for plan in plans))
    return kept([update.a for update in updates], form, make)


def _stacked_b(plan: _Plan, dtype: torch.dtype) -> Tensor:
    """The b of a layer's updates [K, o, rank], with scalings relative to that of the layer; zeros where a part has fewer than others."""
    updates = [update for part in plan.parts for update in part]
    if len(plan.parts) == 1 and len(updates) == 1:
        return cast(updates[0].b, dtype)[None]
    template = updates[0].b

    def make() -> Tensor:
        rows = []
        for part in plan.parts:
            blocks = [
                cast(one.b, dtype) if one.scaling == plan.scaling else cast(one.b, dtype) * (one.scaling / plan.scaling) for one in part
            ]
            if missing := plan.rank - sum(update.a.shape[0] for update in part):
                blocks.append(template.new_zeros(len(template), missing, dtype=dtype))
            rows.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1))
        return torch.stack(rows)

    form = ("b", dtype, tuple(tuple(update.scaling for update in part) for part in plan.parts))
    return kept([update.b for update in updates], form, make)


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., d] as a matrix in ``dtype``."""
    return x.to(dtype).reshape(x.shape[:-1].numel(), x.shape[-1])


def _divided(flat: Tensor, num_parts: int) -> Tensor:
    """[K * S, d] as [K, S, d]."""
    return flat.view(num_parts, flat.shape[0] // num_parts, flat.shape[1])


def _products(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling * a @ b for [K, n, k] and [K, k, m]."""
    if a.shape[0] > 1:
        # With beta 0 the old content is not read.
        return torch.bmm(a, b) if scaling == 1.0 else a.new_empty(*a.shape[:2], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scaling)
    return scaled_product(a[0], b[0], scaling)[None]


def _add_low_rank_(total: Tensor, low: Tensor, b: Tensor, scaling: float) -> None:
    """total += scaling * low @ b^T, in place, for [K, S, o], [K, S, rank] and [K, o, rank]."""
    if low.shape[0] > 1:
        total.baddbmm_(low, b.transpose(1, 2), alpha=scaling)
    else:
        total[0].addmm_(low[0], b[0].T, alpha=scaling)

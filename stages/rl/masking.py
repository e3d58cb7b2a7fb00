"""Reductions over the tokens that count. x and mask have one shape, usually [B, R]; the mask is never optional.

What lies under a False of the mask has no effect, not even where it is infinite or not a number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over counted entries: a scalar, or along ``dim``."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over counted entries, 0 where none counts: a scalar, or along ``dim``."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance over counted entries; a scalar."""
    x = torch.where(mask, x, torch.zeros_like(x))  # first: infinity - mean would poison the gradient
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def standardize(x: Tensor, mask: Tensor, *, mean: Tensor, variance: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) where the mask is True, 0 elsewhere. mean and variance may come from all processes."""
    x = torch.where(mask, x, torch.zeros_like(x))
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + epsilon), torch.zeros_like(x))


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit biased variance over counted entries (openai/lm-human-preferences ``whiten``); 0 elsewhere."""
    return standardize(x, mask, mean=masked_mean(x, mask), variance=masked_variance(x, mask))


def scale_to_unit_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Unit variance over counted entries with the mean as it was (the papers' whitening of rewards); 0 elsewhere."""
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), torch.zeros_like(x))

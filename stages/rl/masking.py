"""Reductions over counted tokens. x and mask have the same shape, usually [B, R]; the mask is required.

Masked-out values have no effect, even if they are infinite or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over counted entries, a scalar; 0 if there are none."""
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance over counted entries; a scalar."""
    x = torch.where(mask, x, torch.zeros_like(x))  # before the subtraction: infinity - mean would make the gradient NaN
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def standardize(x: Tensor, mask: Tensor, *, mean: Tensor, variance: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) where the mask is True, 0 elsewhere. mean and variance may come from all processes."""
    x = torch.where(mask, x, torch.zeros_like(x))
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + epsilon), torch.zeros_like(x))


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit biased variance over counted entries (openai/lm-human-preferences ``whiten``); 0 elsewhere."""
    return standardize(x, mask, mean=masked_mean(x, mask), variance=masked_variance(x, mask))


def scale_to_unit_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Scale counted entries to unit variance and keep their mean (the papers' whitening of rewards); 0 elsewhere."""
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), torch.zeros_like(x))

"""Copies of tensors to a GPU that do not make the CPU wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. A copy to a GPU comes from pinned memory, so the CPU does not wait for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


def moved_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Move tensors of the same dtype to ``device`` in one transfer, without making the CPU wait for a GPU."""
    if torch.device(device).type == "cpu":
        return list(tensors)
    flat = on_device(torch.cat([tensor.reshape(-1) for tensor in tensors]), torch.device(device))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

"""Weights that are cast to half precision once for many passes, not once in every pass.

Autocast keeps the casts of trainable weights as long as one of its contexts is open, and computes the gradient through them. So a context
that is open around several passes keeps the casts for all of them. It need not switch autocast on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_kept: dict[int, tuple[Tensor, Tensor]] | None = None  # id of a parameter -> it and its cast; None outside of ``kept_casts``


@contextmanager
def kept_casts(device_type: str) -> Iterator[None]:
    """Within it, autocast and ``cast`` make one half-precision copy of each weight and use it again.

    No weight may change within it: put it around the passes of one optimizer step. Autocast itself stays off, so every pass still says
    what it computes in. The copies take memory between the passes; within a pass they are there in any case.
    """
    global _kept
    outer, _kept = _kept, {}
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _kept = outer


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, without gradient. Within ``kept_casts`` a parameter is cast once."""
    if tensor.dtype == dtype:
        return tensor.detach()
    if _kept is None or not isinstance(tensor, nn.Parameter):
        return tensor.detach().to(dtype)
    _, made = _kept.get(id(tensor), (None, None))
    if made is None or made.dtype != dtype:
        made = tensor.detach().to(dtype)
        _kept[id(tensor)] = (tensor, made)  # the parameter is kept, too, so that no other gets its id
    return made

"""Whether PyTorch's fused AdamW works for some weights. Where it does not, AdamW uses foreach operations."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def fused_adamw_works(weights: Iterable[Tensor]) -> bool:
    """Whether fused AdamW can make a step for ``weights``. If not, the log says why, once for each device and dtype."""
    kinds = {(weight.device.type, weight.dtype) for weight in weights}
    problems = [_problem(*kind) for kind in sorted(kinds, key=str)]
    return not any(problems)


@cache
def _problem(device_type: str, dtype: torch.dtype) -> str:
    """Why a fused step of one number fails on a device; empty if it works."""
    try:
        weight = torch.ones(1, device=device_type, dtype=dtype).requires_grad_()
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], fused=True).step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        logger.warning("AdamW uses foreach operations, because its fused step fails for %s on %s (%s)", dtype, device_type, reason)
        return reason
    return ""

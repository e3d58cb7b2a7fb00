"""Cast weights to half precision once for several passes instead of once per pass.

Autocast keeps the casts of trainable weights until its outermost context ends, and computes gradients through them. So a context around
several passes keeps the casts for all of them, even if it does not enable autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_kept: dict[Hashable, tuple[object, Tensor]] | None = None  # key of parameters -> they and their copy; None outside of ``kept_casts``


@contextmanager
def kept_casts(device_type: str) -> Iterator[None]:
    """Context manager in which autocast and ``cast`` create one half-precision copy of each weight and reuse it.

    Weights must not change within the context: use it for the passes of one optimizer step. Autocast itself stays disabled, so every pass
    must still set its precision. The copies use memory between passes; within a pass they exist in any case.

    Backward passes run in the calling thread. On a GPU they usually run in another thread, which does not know the outer context:
    when gradient checkpointing recomputes a layer there, the end of its autocast context would drop the copies of all weights.
    """
    global _kept
    outer, _kept = _kept, {}
    try:
        with torch.autocast(device_type, enabled=False), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _kept = outer


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, without gradient. Within ``kept_casts``, a parameter is cast only once."""
    if tensor.dtype == dtype:
        return tensor.detach()
    if _kept is None or not isinstance(tensor, nn.Parameter):
        return tensor.detach().to(dtype)
    _, made = _kept.get(id(tensor), (None, None))
    if made is None or made.dtype != dtype:
        made = tensor.detach().to(dtype)
        _kept[id(tensor)] = (tensor, made)  # the parameter is kept as well, so that its id is not reused
    return made


def keeps_casts() -> bool:
    """Whether this is inside ``kept_casts``."""
    return _kept is not None


def cast_with_gradient(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``; gradients flow to ``weight``, if it is trained and gradients are enabled. Within ``kept_casts``, it is cast
    only once with and once without gradients."""
    return kept((weight,), ("with gradient", dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()), lambda: weight.to(dtype))


def kept(parameters: Sequence[Tensor], form: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a tensor computed from ``parameters``. Within ``kept_casts`` it is computed only once for the same
    parameters and the same ``form``, which must say everything else that ``make`` depends on."""
    if _kept is None:
        return make()
    key = (*map(id, parameters), form)
    if key not in _kept:
        _kept[key] = (tuple(parameters), make())
    return _kept[key][1]

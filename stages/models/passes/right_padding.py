"""Passes over right-padded rows without a mask. B rows, T tokens of the longest.

A causal model does not attend to the padding on the right. If a pass has a mask, transformers reads it once or twice, for which the CPU
waits for the GPU, and the fastest attention kernels cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from stages.models.layers.longrope import positions_of_rows
from stages.models.passes.packing import one_sequence_per_row


@contextmanager
def without_masks(*models: nn.Module | None) -> Iterator[None]:
    """Context manager in which causal ``models`` leave out the masks [B, T] of right-padded rows. Use it only for such rows.

    Rows with position ids keep their masks. So do models that return the logits of their routers, because the loss of the routers must
    not count padding.
    """
    with ExitStack() as stack:
        stack.enter_context(one_sequence_per_row())
        for model in models:
            if model is not None:
                stack.callback(model.register_forward_pre_hook(_leave_out, with_kwargs=True).remove)
        yield


def _leave_out(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or named.get("position_ids") is not None:
        return None
    if named.get("output_router_logits") or getattr(getattr(model, "config", None), "output_router_logits", False):
        return None
    others = {name: value for name, value in named.items() if name != "attention_mask"}
    return inputs, {**others, **positions_of_rows(model, ids, mask.sum(dim=1))}

"""Checks that scores are finite, and that there is one per completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.errors import TrainingError


def checked(scores: Tensor, name: str, completions: Sequence[str]) -> Tensor:
    """Return ``scores`` as [N] fp32 on the CPU.

    Raises TrainingError if the shape is not [N] or a score is not finite; it names the source and the first bad completion.
    """
    scores = torch.as_tensor(scores, dtype=torch.float32).cpu()
    if scores.shape != (len(completions),):
        expected = f"expected one number per completion ({len(completions)})"
        raise TrainingError(f"reward {name!r} returned scores of shape {tuple(scores.shape)}; {expected}")
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        row = int(bad[0])
        value, text = float(scores[row]), completions[row][:80]
        raise TrainingError(f"reward {name!r} returned {value} for the completion {text!r}; expected a finite number")
    return scores

"""Combine the scores of several judges (an ensemble). K judges, N texts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Combine = Literal["mean", "min", "uncertainty"]


def combine_scores(scores: Tensor, *, how: Combine, uncertainty_coef: float = 1.0) -> Tensor:
    """Combine scores [K, N] to [N]: their mean, their minimum, or mean - uncertainty_coef * biased variance over the K judges.

    Minimum and variance: the worst-case and uncertainty-weighted optimization of Coste et al. 2024 (arXiv 2310.02743).
    """
    if how == "min":
        return scores.min(dim=0).values
    mean = scores.mean(dim=0)
    return mean if how == "mean" else mean - uncertainty_coef * scores.var(dim=0, correction=0)

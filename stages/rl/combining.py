"""Making one score of several: ensembles of judges. K judges, N texts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Combine = Literal["mean", "min", "uncertainty"]


def combine_scores(scores: Tensor, *, how: Combine, uncertainty_coef: float = 1.0) -> Tensor:
    """Scores [K, N] as one [N]: their mean, their minimum, or mean - uncertainty_coef * biased variance over the K judges.

    Minimum and variance are the worst-case and the uncertainty-weighted optimisation of Coste et al. 2024 (arXiv 2310.02743).
    """
    if how == "min":
        return scores.min(dim=0).values
    mean = scores.mean(dim=0)
    return mean if how == "mean" else mean - uncertainty_coef * scores.var(dim=0, correction=0)

"""Confidence intervals of a mean: Wilson's interval, its extension to ties and repeated samples, the bootstrap, and sample sizes.

N values, one per prompt, each a share in [0, 1]. Results are floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) without trials. ``trials`` may be fractional (an effective number)."""
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + Z95**2 / trials
    middle = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * math.sqrt(max(0.0, share * (1 - share)) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_variance(values: Sequence[float]) -> float:
    """Variance of one prompt's value, estimated from ``values`` [N] plus one 0 and one 1, so that it is never 0.

    If all values are 0 or 1, this is the Bernoulli variance of their mean (see ``design_effect``).
    """
    count = len(values) + 2
    mean = (sum(values) + 1) / count
    return (sum(value * value for value in values) + 1) / count - mean * mean


def design_effect(values: Sequence[float]) -> float:
    """Variance of the values relative to coin flips with the same mean: 1 for wins and losses, less for ties and means of samples."""
    mean = (sum(values) + 1) / (len(values) + 2)
    return share_variance(values) / (mean * (1 - mean))


def share_interval(values: Sequence[float], share: float | None = None) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [N]: Wilson's, with the effective number of trials N / ``design_effect``.

    It equals Wilson's interval if there are no ties and one sample per prompt. The plain Wilson interval would treat a tie, or a mean over
    samples, as noisy as a win; a nominal 95 % interval then covers more than 99 %. ``share``: an estimate other than the mean, with
    ``values`` its pseudo-values per prompt.
    """
    if not values:
        return 0.0, 1.0
    share = min(1.0, max(0.0, sum(values) / len(values) if share is None else share))
    trials = len(values) / design_effect(values)
    return wilson_interval(share * trials, trials)


def bootstrap_interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [N] over resampled prompts (Efron 1979); NaN for fewer than two, which show no
    spread. For differences: the paired bootstrap.
    """
    import torch  # imported here so that a report, which needs only Wilson's interval, starts fast

    if len(values) < 2:
        return math.nan, math.nan
    data = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 2_000_000 // len(data))  # resamples in memory at the same time
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    means = [data[torch.randint(len(data), (size, len(data)), generator=generator)].mean(dim=1) for size in sizes]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def prompts_needed(share: float, variance: float, *, power: float = 0.8) -> float:
    """Number of prompts that a two-sided 5 % test needs to distinguish ``share`` from one half with ``power``; infinite at one half.

    ``variance``: of one prompt's value; at most 1/4, less with ties or several samples.
    """
    if share == 0.5:
        return math.inf
    return math.ceil(variance * ((Z95 + NormalDist().inv_cdf(power)) / (share - 0.5)) ** 2)

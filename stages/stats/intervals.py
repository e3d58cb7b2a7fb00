"""How sure a mean is: Wilson's interval, its kin for ties and repeated samples, the bootstrap, and how many prompts a difference needs.

N values, one per prompt, each a share in [0, 1]; plain floats come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) without trials. ``trials`` need not be whole: an effective number is one."""
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + Z95**2 / trials
    middle = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * math.sqrt(max(0.0, share * (1 - share)) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_variance(values: Sequence[float]) -> float:
    """Variance of one prompt's value, as of the values [N] together with one 0 and one 1; never 0, so that no finding is certain.

    Where every value is 0 or 1 this is exactly the variance of a coin with their mean (see ``design_effect``).
    """
    number = len(values) + 2
    mean = (sum(values) + 1) / number
    return (sum(value * value for value in values) + 1) / number - mean * mean


def design_effect(values: Sequence[float]) -> float:
    """Variance of the values over that of coin flips with their mean: 1 for wins and losses, less for ties and for means of samples."""
    mean = (sum(values) + 1) / (len(values) + 2)
    return share_variance(values) / (mean * (1 - mean))


def share_interval(values: Sequence[float], share: float | None = None) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [N]: Wilson's, with as many trials as coin flips would need to be equally sure.

    Without ties and with one sample per prompt it is Wilson's own. Wilson's taken as it is would treat a tie, or a mean over samples, as
    if it were as noisy as a win: it then covers more than 99 % where it says 95 %. ``share``: an estimate other than the plain mean, of
    which ``values`` are the prompts' pseudo-values.
    """
    if not values:
        return 0.0, 1.0
    share = min(1.0, max(0.0, sum(values) / len(values) if share is None else share))
    trials = len(values) / design_effect(values)
    return wilson_interval(share * trials, trials)


def bootstrap_interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [N] over resampled prompts (Efron 1979); of differences it is the paired one."""
    import torch  # here, so that whoever needs Wilson's interval alone (a report) starts at once

    if not values:
        return math.nan, math.nan
    numbers = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 2_000_000 // len(numbers))  # resamples held at once
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    means = [numbers[torch.randint(len(numbers), (size, len(numbers)), generator=generator)].mean(dim=1) for size in sizes]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def prompts_needed(share: float, variance: float, *, power: float = 0.8) -> float:
    """Prompts with which a two-sided test at 5 % tells ``share`` from one half with probability ``power``; infinite at one half.

    ``variance`` is that of one prompt's value: 1/4 at most, less with ties and with several samples.
    """
    if share == 0.5:
        return math.inf
    return math.ceil(variance * ((Z95 + NormalDist().inv_cdf(power)) / (share - 0.5)) ** 2)


def detectable_share(prompts: int, variance: float, *, power: float = 0.8) -> float:
    """The win rate above one half that so many prompts tell from one half with probability ``power``."""
    return min(1.0, 0.5 + (Z95 + NormalDist().inv_cdf(power)) * math.sqrt(variance / max(1, prompts)))

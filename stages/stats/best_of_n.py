"""Best-of-n estimates from N samples of a prompt: the mean score of the best of n, and its KL from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_of_n_kl(n: int) -> float:
    """KL (nats) between best-of-``n`` sampling and the policy: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    Correct if all samples differ and have no ties. With fewer distinct samples the true KL is smaller (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Sequence[float], n: int) -> list[float]:
    """Probability of each of N samples to have the highest of ``scores`` among ``n`` drawn without replacement; they sum to 1.

    A mean over the samples with these weights is an unbiased estimate under best-of-n (Nakano et al. 2021, appendix I). Samples with equal
    scores share their probability evenly. Raises ValueError unless 1 <= n <= N.
    """
    num_samples = len(scores)
    if not 1 <= n <= num_samples:
        raise ValueError(f"best of n={n} needs 1 <= n <= {num_samples}, the number of samples")
    order = sorted(range(num_samples), key=lambda index: scores[index])
    subsets = math.comb(num_samples, n)
    weights = [0.0] * num_samples
    start = 0
    while start < num_samples:
        stop = start
        while stop < num_samples and scores[order[stop]] == scores[order[start]]:
            stop += 1
        # The best one is in this group of ties if all n samples are below `stop` but not all are below `start`.
        share = (math.comb(stop, n) - math.comb(start, n)) / subsets / (stop - start)
        for index in order[start:stop]:
            weights[index] = share
        start = stop
    return weights

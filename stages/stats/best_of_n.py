"""Best-of-n from one set of N samples of a prompt: what the best of n scores on average, and how far that leads from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_of_n_kl(n: int) -> float:
    """KL (nats) of the best of ``n`` samples to the policy that made them: log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    Exact where no two samples are alike and no two tie; with fewer different samples the true one is smaller (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Sequence[float], n: int) -> list[float]:
    """Probability that each of N samples is the best by ``scores`` among ``n`` drawn without replacement; the weights sum to 1.

    The weighted mean of anything over the samples is an unbiased estimate of its mean under best-of-n (Nakano et al. 2021, appendix I).
    Samples with equal scores share their weight evenly, as a draw among them would.
    """
    number = len(scores)
    if not 1 <= n <= number:
        raise ValueError(f"best of n={n} needs 1 <= n <= the {number} samples there are")
    order = sorted(range(number), key=lambda place: scores[place])
    subsets = math.comb(number, n)
    weights = [0.0] * number
    start = 0
    while start < number:
        stop = start
        while stop < number and scores[order[stop]] == scores[order[start]]:
            stop += 1
        # The best is one of these where all n are below `stop` and not all below `start`.
        share = (math.comb(stop, n) - math.comb(start, n)) / subsets / (stop - start)
        for place in order[start:stop]:
            weights[place] = share
        start = stop
    return weights

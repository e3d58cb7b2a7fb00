"""Best-of-n: the estimator equals the mean over all subsets, and the KL equals a sum over a small distribution."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from stages.stats.best_of_n import best_of_n_kl, best_of_n_weights


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.9, 0.4], [1.0, 1.0, 0.0, 1.0, 0.0], [2.0] * 5])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_are_the_share_of_subsets(scores: list[float], n: int) -> None:
    expected = [0.0] * 5
    subsets = list(combinations(range(5), n))
    for subset in subsets:
        best = [index for index in subset if scores[index] == max(scores[other] for other in subset)]
        for index in best:
            expected[index] += 1 / len(best) / len(subsets)
    weights = best_of_n_weights(scores, n)
    assert sum(weights) == pytest.approx(1)
    if len(set(scores)) == 5:
        assert weights == pytest.approx(expected)
    for value in set(scores):  # equal scores may share their weight in any way; the sum of their weights is exact
        indices = [index for index, score in enumerate(scores) if score == value]
        assert sum(weights[index] for index in indices) == pytest.approx(sum(expected[index] for index in indices))


def test_the_estimate_is_unbiased() -> None:
    # a fair die: the best of 2 is k with probability (2 k - 1) / 36, mean 161 / 36; average the estimate over all sets of three rolls
    rolls = [(a, b, c) for a in range(1, 7) for b in range(1, 7) for c in range(1, 7)]
    mean = sum(sum(w * x for w, x in zip(best_of_n_weights(roll, 2), roll, strict=True)) for roll in rolls) / len(rolls)
    assert mean == pytest.approx(161 / 36)


def test_kl_of_best_of_n_is_just_above_the_exact_kl() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)
    # 2000 equally likely, distinct outcomes: the best of 4 is outcome k with probability (k/m)^4 - ((k-1)/m)^4
    m = 2000
    chances = [(k / m) ** 4 - ((k - 1) / m) ** 4 for k in range(1, m + 1)]
    expected = sum(p * math.log(p * m) for p in chances)
    assert best_of_n_kl(4) == pytest.approx(expected, abs=2e-3)
    assert expected < best_of_n_kl(4)  # the formula is the limit for many outcomes


def test_n_above_the_sample_count_is_refused() -> None:
    with pytest.raises(ValueError, match="n=3 needs 1 <= n <= 2, the number of samples"):
        best_of_n_weights([1.0, 2.0], 3)

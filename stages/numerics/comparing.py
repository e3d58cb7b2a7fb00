"""Comparing completions: win rates of paired scores, and how varied texts are. N prompts; plain floats come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.numerics.classification import wilson_interval


@dataclass(frozen=True)
class WinRate:
    """How often ``a`` beats ``b`` on the same prompts; a tie is half a win. ``ci_low``, ``ci_high`` are Wilson's 95 % interval.

    ``n`` counts prompts; ``wins`` and ``ties`` count samples, of which a prompt may have several.
    """

    win_rate: float
    ci_low: float
    ci_high: float
    wins: int
    ties: int
    n: int


def win_rate(a: Sequence[float], b: Sequence[float], *, cluster_size: int = 1) -> WinRate:
    """Compare paired scores [N]; every ``cluster_size`` neighbours are samples of one prompt.

    A prompt counts once, by the mean over its samples: samples of one prompt are not independent. Fractions (ties as half a win, such
    means) make the interval wider than needed, never too narrow.
    """
    if len(a) != len(b):
        raise ValueError(f"scores must be paired, got {len(a)} and {len(b)}")
    wins = sum(x > y for x, y in zip(a, b, strict=True))
    ties = sum(x == y for x, y in zip(a, b, strict=True))
    share = (wins + 0.5 * ties) / len(a) if a else 0.5
    prompts = len(a) // cluster_size
    low, high = wilson_interval(share * prompts, prompts)
    return WinRate(share, low, high, wins, ties, prompts)


def distinct_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of different n-grams among all n-grams of all rows (Li et al. 2016); 0 where no row is long enough."""
    grams = [tuple(row[start : start + n]) for row in rows for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of n-grams that occurred before in their own row; 0 where no row is long enough."""
    grams = [[tuple(row[start : start + n]) for start in range(len(row) - n + 1)] for row in rows]
    number = sum(map(len, grams))
    return sum(len(own) - len(set(own)) for own in grams) / number if number else 0.0

"""Comparing completions: win rates, with and without the help of length, and how varied texts are. Plain floats come back.

N comparisons of one candidate with another; ``prompts`` [N] tells which of them answer the same prompt. A preference is 1 where the first
candidate wins, 0 where it loses, 1/2 for a tie, and anything between where a judge was asked more than once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from stages.stats.intervals import bootstrap_interval, prompts_needed, share_interval, share_variance

RIDGE = 0.1  # weight of the penalty that keeps the length-controlled fit finite where one side always wins; worth a tenth of a prompt


@dataclass(frozen=True)
class WinRate:
    """How often the first candidate wins; a tie is half a win. ``ci_low``, ``ci_high``: ``share_interval`` over the prompts, at 95 %.

    ``n`` counts prompts, each of which weighs the same; ``samples``, ``wins`` and ``ties`` count comparisons. ``bootstrap_low`` and
    ``bootstrap_high`` resample prompts. ``variance`` is that of one prompt; with ``prompts_needed`` as many prompts the win rate seen would
    be told from one half four times in five.
    """

    win_rate: float
    ci_low: float
    ci_high: float
    wins: int
    ties: int
    n: int
    samples: int
    bootstrap_low: float
    bootstrap_high: float
    variance: float
    prompts_needed: float


def preferences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Preferences [N] that paired scores express."""
    if len(first) != len(second):
        raise ValueError(f"scores must be paired, got {len(first)} and {len(second)}")
    return [(x > y) + 0.5 * (x == y) for x, y in zip(first, second, strict=True)]


def prompt_means(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> list[float]:
    """The mean of ``values`` [N] for each prompt, in order of first appearance. None: every value has a prompt of its own."""
    if prompts is None:
        return list(values)
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    return [sum(group) / len(group) for group in groups.values()]


def win_rate(preferred: Sequence[float], prompts: Sequence[Hashable] | None = None) -> WinRate:
    """The win rate that preferences [N] amount to. Samples of one prompt are not independent: a prompt counts once, by their mean."""
    means = prompt_means(preferred, prompts)
    share = sum(means) / len(means) if means else 0.5
    low, high = share_interval(means)
    bootstrap_low, bootstrap_high = bootstrap_interval(means)
    variance = share_variance(means)
    return WinRate(
        win_rate=share,
        ci_low=low,
        ci_high=high,
        wins=sum(value > 0.5 for value in preferred),
        ties=sum(value == 0.5 for value in preferred),
        n=len(means),
        samples=len(preferred),
        bootstrap_low=bootstrap_low,
        bootstrap_high=bootstrap_high,
        variance=variance,
        prompts_needed=prompts_needed(share, variance),
    )


@dataclass(frozen=True)
class LengthControlled:
    """The win rate expected of answers of equal length. ``length_effect``: log odds per unit of the squashed difference in length."""

    win_rate: float
    ci_low: float
    ci_high: float
    length_effect: float


def length_controlled_win_rate(
    preferred: Sequence[float], longer: Sequence[float], prompts: Sequence[Hashable] | None = None
) -> LengthControlled:
    """Win rate at equal lengths (Dubois et al. 2024), from preferences [N] and how much longer [N] the first candidate's answers are.

    log odds of a win = skill + effect * tanh(difference / its standard deviation), fitted by maximum likelihood with a slight ridge; the
    skill alone gives the win rate. Its interval is ``share_interval`` of the prompts' pseudo-values (what each prompt moves the fit by).
    """
    groups = list(range(len(preferred))) if prompts is None else list(prompts)
    numbers: dict[Hashable, int] = {}
    places = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])
    if not len(places):
        return LengthControlled(0.5, 0.0, 1.0, 0.0)
    y = torch.tensor(list(preferred), dtype=torch.float64)
    difference = torch.tensor(list(longer), dtype=torch.float64)
    spread = float(difference.std(correction=0))
    x = torch.stack([torch.ones_like(y), torch.tanh(difference / spread) if spread else torch.zeros_like(y)], dim=1)
    weight = 1 / torch.bincount(places).double()[places]  # a prompt counts once
    ridge = RIDGE * torch.eye(2, dtype=torch.float64)
    fit = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        chance = torch.sigmoid(x @ fit)
        curvature = (x * (weight * chance * (1 - chance))[:, None]).T @ x + ridge
        move = torch.linalg.solve(curvature, x.T @ (weight * (y - chance)) - ridge @ fit)
        fit = fit + move.clamp(-2, 2)  # a whole Newton step can overshoot where nearly all are won
        if float(move.abs().max()) < 1e-10:
            break
    chance = torch.sigmoid(x @ fit)
    curvature = (x * (weight * chance * (1 - chance))[:, None]).T @ x + ridge
    pushes = torch.zeros(len(numbers), 2, dtype=torch.float64).index_add_(0, places, x * (weight * (y - chance))[:, None])
    moves = torch.linalg.solve(curvature, pushes.T)[0]
    share = 1 / (1 + math.exp(-float(fit[0])))
    pseudo = share + len(numbers) * share * (1 - share) * moves
    low, high = share_interval(pseudo.tolist(), share)
    return LengthControlled(share, low, high, float(fit[1]))


def distinct_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of different n-grams among all n-grams of all rows (Li et al. 2016); 0 where no row is long enough."""
    grams = [tuple(row[start : start + n]) for row in rows for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of n-grams that occurred before in their own row; 0 where no row is long enough."""
    grams = [[tuple(row[start : start + n]) for start in range(len(row) - n + 1)] for row in rows]
    number = sum(map(len, grams))
    return sum(len(own) - len(set(own)) for own in grams) / number if number else 0.0

"""Compare completions: win rates, with and without length control, and diversity of texts. Results are floats.

N comparisons of one candidate with another; ``prompts`` [N] identifies comparisons on the same prompt. A preference is 1 if the first
candidate wins, 0 if it loses, 1/2 for a tie, and a value in between if a judge was asked several times.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from stages.stats.intervals import bootstrap_interval, prompts_needed, share_interval, share_variance

RIDGE = 0.1  # penalty that keeps the length-controlled fit finite if one side always wins; equivalent to a tenth of a prompt


@dataclass(frozen=True)
class WinRateEstimate:
    """Win rate of the first candidate; a tie is half a win. ``ci_low``, ``ci_high``: ``share_interval`` over prompts, at 95 %.

    ``n`` counts prompts, all with the same weight; ``samples``, ``wins`` and ``ties`` count comparisons. ``bootstrap_low`` and
    ``bootstrap_high`` resample prompts. ``variance``: of one prompt. ``prompts_needed``: number of prompts that distinguishes this win
    rate from one half with a power of 0.8.
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
    """Preferences [N] from paired scores. Raises ValueError if their lengths differ."""
    if len(first) != len(second):
        raise ValueError(f"scores must be paired, got {len(first)} and {len(second)}")
    return [(x > y) + 0.5 * (x == y) for x, y in zip(first, second, strict=True)]


def prompt_means(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> list[float]:
    """The mean of ``values`` [N] for each prompt, in order of first appearance. None: every value has a different prompt."""
    if prompts is None:
        return list(values)
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    return [sum(group) / len(group) for group in groups.values()]


def win_rate(preferred: Sequence[float], prompts: Sequence[Hashable] | None = None) -> WinRateEstimate:
    """The win rate of preferences [N]. Samples of one prompt are not independent, so each prompt counts once, with its mean."""
    means = prompt_means(preferred, prompts)
    share = sum(means) / len(means) if means else 0.5
    low, high = share_interval(means)
    bootstrap_low, bootstrap_high = bootstrap_interval(means)
    variance = share_variance(means)
    return WinRateEstimate(
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
    """The expected win rate at equal lengths. ``length_effect``: log odds per unit of the squashed difference in length."""

    win_rate: float
    ci_low: float
    ci_high: float
    length_effect: float


def length_controlled_win_rate(
    preferred: Sequence[float], longer: Sequence[float], prompts: Sequence[Hashable] | None = None
) -> LengthControlled:
    """Win rate at equal lengths (Dubois et al. 2024), from preferences [N] and the excess lengths [N] of the first candidate's answers.

    log odds of a win = skill + effect * tanh(difference / its standard deviation), fitted by maximum likelihood with a small ridge
    penalty. The win rate is the sigmoid of the skill. Its interval is ``share_interval`` of the prompts' pseudo-values (the influence of
    each prompt on the fit).
    """
    groups = list(range(len(preferred))) if prompts is None else list(prompts)
    prompt_indices: dict[Hashable, int] = {}
    prompt_index = torch.tensor([prompt_indices.setdefault(group, len(prompt_indices)) for group in groups])
    if not len(prompt_index):
        return LengthControlled(0.5, 0.0, 1.0, 0.0)
    y = torch.tensor(list(preferred), dtype=torch.float64)
    difference = torch.tensor(list(longer), dtype=torch.float64)
    spread = float(difference.std(correction=0))
    x = torch.stack([torch.ones_like(y), torch.tanh(difference / spread) if spread else torch.zeros_like(y)], dim=1)
    weight = 1 / torch.bincount(prompt_index).double()[prompt_index]  # all prompts have the same weight
    ridge = RIDGE * torch.eye(2, dtype=torch.float64)
    fit = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        chance = torch.sigmoid(x @ fit)
        curvature = (x * (weight * chance * (1 - chance))[:, None]).T @ x + ridge
        move = torch.linalg.solve(curvature, x.T @ (weight * (y - chance)) - ridge @ fit)
        fit = fit + move.clamp(-2, 2)  # a full Newton step can overshoot if nearly all comparisons are won
        if float(move.abs().max()) < 1e-10:
            break
    chance = torch.sigmoid(x @ fit)
    curvature = (x * (weight * chance * (1 - chance))[:, None]).T @ x + ridge
    pushes = torch.zeros(len(prompt_indices), 2, dtype=torch.float64).index_add_(0, prompt_index, x * (weight * (y - chance))[:, None])
    moves = torch.linalg.solve(curvature, pushes.T)[0]
    share = 1 / (1 + math.exp(-float(fit[0])))
    pseudo = share + len(prompt_indices) * share * (1 - share) * moves
    low, high = share_interval(pseudo.tolist(), share)
    return LengthControlled(share, low, high, float(fit[1]))


def distinct_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of all rows (Li et al. 2016); 0 if no row has n tokens."""
    grams = [tuple(row[start : start + n]) for row in rows for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(rows: Sequence[Sequence[int] | Sequence[str]], n: int) -> float:
    """Share of n-grams that occurred earlier in the same row; 0 if no row has n tokens."""
    grams = [[tuple(row[start : start + n]) for start in range(len(row) - n + 1)] for row in rows]
    total = sum(map(len, grams))
    return sum(len(own) - len(set(own)) for own in grams) / total if total else 0.0

"""Numbers of the papers, computed by hand, to check implementations: ours (test_numbers.py), TRL's (tests/benchmarks/conformance_trl.py).

A case calls a function of an ``Implementation`` and compares the result with a number. If an implementation lacks a function, it is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ONES = torch.ones(1, 3, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """The functions of a library. B sequences, R tokens; masks are True where a token counts."""

    name: str
    whiten: Callable[[Tensor, Tensor], Tensor] | None = None  # (x [B, R], mask) -> zero mean, unit variance
    scale: Callable[[Tensor, Tensor], Tensor] | None = None  # the same with the mean kept
    gae: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]] | None = None  # rewards, values, mask, gamma, lambda
    policy_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # (ratio, advantages, mask), clip 0.2 -> mean
    value_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None  # (values, old, returns, mask), clip 0.2 -> half mean
    adaptive_kl: Callable[[float, float, int], float] | None = None  # (coefficient, KL, episodes), target 6, horizon 10000 -> coefficient
    adam: Callable[[float, float], float] | None = None  # (gradient, epsilon) -> first step / learning rate, betas 0.9, 0.999
    penalize: Callable[[Tensor, Tensor], Tensor] | None = None  # (scores, stopped), penalty 1 -> scores
    ranking_loss: Callable[[Sequence[Sequence[float]]], float] | None = None  # scores of each prompt, best first -> mean over prompts
    best_of: Callable[[Sequence[float], int], float] | None = None  # (scores, index of the best)
    response_mask: Callable[[Tensor, int], Tensor] | None = None  # (response ids [B, R], end token) -> True through the end token
    logprobs: Callable[[Tensor, Tensor, float], Tensor] | None = None  # (logits, tokens, temperature)
    mean_entropy: Callable[[Tensor, Tensor], float] | None = None  # (logits [B, R, V], mask)
    average: Callable[[float, float, float, int], float] | None = None  # (average, weight, decay, times) -> average
    reward_head_std: Callable[[int], float] | None = None  # width -> standard deviation of a new head's weights
    rewards: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None  # (scores, log ratio, mask, coefficient) -> per token


@dataclass(frozen=True)
class Case:
    """An expected number."""

    detail: str  # id of stages/conformance.py
    what: str
    needs: str  # name of the function of an Implementation
    run: Callable[[Any], Any]
    expected: Any
    tolerance: float = 1e-5


def _grid(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows)


def _masked(whiten: Any) -> list[float]:
    """Whitened values of the counted entries. The numbers under the mask must have no effect."""
    x, mask = _grid([1.0, 2.0, 99.0], [3.0, -50.0, 7.0]), torch.tensor([[True, True, False], [True, False, False]])
    return whiten(x, mask)[mask].tolist()


def _ramp() -> Tensor:
    return _grid([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])


def _gae(function: Any) -> list[list[float]]:
    advantages, returns = function(_grid([0.0, 0.0, 1.0]), _grid([0.5, 0.5, 0.5]), ONES, 1.0, 0.95)
    return [advantages[0].tolist(), returns[0].tolist()]


def _ragged_gae(function: Any) -> list[float]:
    mask = torch.tensor([[True, True, False]])
    advantages, _ = function(_grid([0.0, 1.0, 77.0]), _grid([0.5, 0.5, 88.0]), mask, 1.0, 0.95)
    return advantages[0][:2].tolist()


def _weights_of_prompts(function: Any) -> list[float]:
    """The losses of nine and of four completions with equal scores; they must be equal."""
    return [function([[0.0] * 9]), function([[0.0] * 4]), function([[0.0] * 9, [1.0, 0.0]])]


def _certain_last() -> Tensor:
    """Logits [1, 3, 8]: two uniform distributions, then one with all probability on one token."""
    return torch.stack([torch.zeros(8), torch.zeros(8), torch.tensor([99.0] + [0.0] * 7)])[None]


CASES = [
    Case("P8", "whitening: mean 0, biased variance 1, the masked entries not counted", "whiten", _masked, [-1.2247449, 0.0, 1.2247449]),
    Case(
        "P9",
        "whitening with the mean kept, first and last of the blog's table",
        "scale",
        lambda f: [f(_ramp(), _ramp() > 0)[index].item() for index in ((0, 0), (2, 2))],
        [0.0508067, 3.1491933],
        1e-4,
    ),
    Case("P6", "GAE, lambda 0.95: advantages and returns", "gae", _gae, [[0.45125, 0.475, 0.5], [0.95125, 0.975, 1.0]]),
    Case("P6", "GAE: entries after the last token have no effect", "gae", _ragged_gae, [0.475, 0.5]),
    Case(
        "P11",
        "clipped objective at ratio 1.5 with advantage 1 and -1",
        "policy_loss",
        lambda f: [f(_grid([1.5]), _grid([a]), torch.tensor([[True]])).item() for a in (1.0, -1.0)],
        [-1.2, 1.5],
    ),
    Case(
        "P11",
        "clipped objective: a padded token is not counted in the mean",
        "policy_loss",
        lambda f: f(_grid([1.0, 1.0, 9.0]), _grid([1.0, 3.0, 50.0]), torch.tensor([[True, True, False]])).item(),
        -2.0,
    ),
    Case(
        "P12",
        "value loss, V_old 0, V 1, return 1: half the clipped error",
        "value_loss",
        lambda f: f(_grid([1.0]), _grid([0.0]), _grid([1.0]), torch.tensor([[True]])).item(),
        0.32,
    ),
    Case(
        "P5",
        "adaptive KL coefficient from 0.15 after 512 episodes at KL 12, 6 and 3",
        "adaptive_kl",
        lambda f: [f(0.15, kl, 512) for kl in (12.0, 6.0, 3.0)],
        [0.151536, 0.15, 0.148464],
        1e-7,
    ),
    Case(
        "G5",
        "Adam's first step at gradient 1e-5 and epsilon 1e-5 (epsilon outside the bias correction)",
        "adam",
        lambda f: f(1e-5, 1e-5),
        0.0306533,
        1e-5,
    ),
    Case(
        "P25",
        "a completion without end: its score of 7 becomes -1",
        "penalize",
        lambda f: f(torch.tensor([7.0, 7.0]), torch.tensor([True, False])).tolist(),
        [7.0, -1.0],
    ),
    Case("R1", "pairwise loss at margin 1", "ranking_loss", lambda f: f([[1.0, 0.0]]), 0.313262),
    Case("R2", "three ranked completions with scores 2, 1, 0", "ranking_loss", lambda f: f([[2.0, 1.0, 0.0]]), 0.251151),
    Case(
        "R2",
        "a prompt with K = 9 weighs as much as one with K = 4 or 2",
        "ranking_loss",
        _weights_of_prompts,
        [math.log(2), math.log(2), (math.log(2) + 0.313262) / 2],
    ),
    Case("R5", "best of four, scores 1, 0, 0, 0", "best_of", lambda f: f([1.0, 0.0, 0.0, 0.0], 0), 0.743668),
    Case("R10", "a new head of width 768: standard deviation 1 / sqrt(769)", "reward_head_std", lambda f: f(768), 1 / math.sqrt(769), 2e-3),
    Case(
        "P23",
        "the response ends with its first end token",
        "response_mask",
        lambda f: f(torch.tensor([[5, 0, 6], [5, 6, 7], [0, 0, 0]]), 0).tolist(),
        [[True, True, False], [True, True, True], [True, False, False]],
    ),
    Case(
        "P21",
        "log-probability of the first of (0.5, 0.25, 0.25) at temperature 0.5: 2/3",
        "logprobs",
        lambda f: f(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0]), 0.5).item(),
        math.log(2 / 3),
    ),
    Case(
        "P34",
        "mean entropy over counted tokens: uniform over 8, and a padded certain token",
        "mean_entropy",
        lambda f: f(_certain_last(), torch.tensor([[True, True, False]])),
        math.log(8),
    ),
    Case(
        "P18",
        "average of weights with decay 0.992, from 0 towards 1, after 1 and 86 steps",
        "average",
        lambda f: [f(0.0, 1.0, 0.992, 1), f(0.0, 1.0, 0.992, 86)],
        [0.008, 1 - 0.992**86],
        1e-5,
    ),
    Case(
        "P3",
        "rewards: -0.1 of the log ratio at every token, the score at the last",
        "rewards",
        lambda f: f(
            torch.tensor([10.0, -5.0]),
            _grid([1.0, -2.0, 3.0], [4.0, 9.0, 9.0]),
            torch.tensor([[True, True, True], [True, False, False]]),
            0.1,
        ).tolist(),
        [[-0.1, 0.2, 9.7], [-5.4, 0.0, 0.0]],
    ),
]


def difference(actual: Any, expected: Any) -> float:
    """The largest difference between two numbers or lists of numbers; infinite if their shapes differ."""
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return math.inf
        return max((difference(one, two) for one, two in zip(actual, expected, strict=True)), default=0.0)
    return abs(float(actual) - float(expected))

"""Advantages without a value network, computed from the returns of full completions. B completions, K per prompt.

Completions of one prompt are adjacent: rows 0 to K - 1 belong to the first prompt. A return is the sum of a completion's rewards. Sums are
in fp64, so that the mean of equal returns is exact and their advantages are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to a deviation before the division."""
FLAT = 1e-6
"""Relative spread below which returns in fp32 count as equal. Their differences are rounding errors, which the division would enlarge."""


def leave_one_out(returns: Tensor, samples_per_prompt: int) -> Tensor:
    """RLOO: each return minus the mean of the prompt's other returns. Inputs and result [B]; K >= 2.

    A_i = R_i - 1/(K-1) sum_{j != i} R_j     Kool et al. 2019; Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3
    """
    groups = returns.double().view(-1, samples_per_prompt)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (samples_per_prompt - 1)
    return (groups - others).flatten().to(returns.dtype)


def group_relative(returns: Tensor, samples_per_prompt: int, *, divide_by_deviation: bool) -> Tensor:
    """GRPO: each return minus the mean of the prompt's returns, divided by their standard deviation. Inputs and result [B]; K >= 2.

    A_i = (R_i - mean(R)) / std(R)     Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2; std is the unbiased one
    A_i = 0                            if all returns of the prompt are equal
    A_i = R_i - mean(R)                ``divide_by_deviation=False``: Liu et al. 2025 ("Dr. GRPO"), https://arxiv.org/abs/2503.20783
    """
    groups = returns.double().view(-1, samples_per_prompt)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_deviation:
        deviation = groups.std(dim=1, keepdim=True, correction=1)
        is_flat = deviation <= FLAT * groups.abs().amax(dim=1, keepdim=True)
        centred = torch.where(is_flat, 0.0, centred / (deviation + EPSILON))
    return centred.flatten().to(returns.dtype)


def batch_baseline(returns: Tensor) -> Tensor:
    """REINFORCE with the mean of the batch as baseline. Inputs and result [B].

    A_i = R_i - mean(R)     Williams 1992, https://doi.org/10.1007/BF00992696, section 4, with the batch mean as reinforcement baseline
    """
    return (returns.double() - returns.double().mean()).to(returns.dtype)


def spread(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Copy the advantage [B] of each completion to all its tokens, [B, R]; 0 outside the mask."""
    return torch.where(response_mask, advantages[:, None], torch.zeros_like(advantages)[:, None])

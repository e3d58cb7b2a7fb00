"""Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438). B sequences, R response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R], 0 outside the mask. The counted tokens of a row must be contiguous from the first column.

    delta_t = r_t + gamma * V_{t+1} - V_t with V = 0 after the last counted token; A_t = delta_t + gamma * lambda * A_{t+1};
    returns = A + V with the values of the rollout, before any whitening.
    """
    zeros = torch.zeros_like(values)
    values, rewards = torch.where(response_mask, values, zeros), torch.where(response_mask, rewards, zeros)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = torch.where(response_mask, rewards + gamma * following - values, zeros)
    advantages = torch.empty_like(values)
    running = torch.zeros_like(values[:, 0])
    for column in range(values.shape[1] - 1, -1, -1):
        running = deltas[:, column] + gamma * gae_lambda * running
        advantages[:, column] = running
    return advantages, advantages + values

"""Compute per-token rewards from scores. B sequences, R response tokens; response_mask is True up to and including the stop token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MissingEOS = Literal["none", "replace", "subtract"]


def last_token_index(response_mask: Tensor) -> Tensor:
    """Column of each row's last counted token. Mask [B, R]; returns [B]. Every row must have a counted token."""
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    return (response_mask * columns).argmax(dim=1)


def penalize_missing_eos(scores: Tensor, stopped: Tensor, *, how: MissingEOS, penalty: float) -> Tensor:
    """Penalize scores [B] of completions without a stop: replace by ``-penalty`` (Ziegler; Huang's EOS trick), or subtract it (TRL)."""
    if how == "none":
        return scores
    penalized = torch.full_like(scores, -penalty) if how == "replace" else scores - penalty
    return torch.where(stopped, scores, penalized)


def penalize_length(scores: Tensor, lengths: Tensor, *, penalty: float) -> Tensor:
    """Scores [B] minus ``penalty`` for each of the ``lengths`` [B] tokens.

    Singhal et al. 2024 (arXiv 2310.03716, section 4) shape the reward by a linear function of the length, too.
    """
    return scores - penalty * lengths


def shape_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float, token_scores: Tensor | None = None) -> Tensor:
    """Per-token rewards [B, R]: -kl_coef * kl (+ token_scores), plus each row's score [B] at its last counted token.

    Ouyang et al. 2022, equation 2, and openai/lm-human-preferences ``compute_rewards``; 0 outside the mask.
    """
    rewards = -kl_coef * kl
    if token_scores is not None:
        rewards = rewards + token_scores
    rewards = torch.where(response_mask, rewards, torch.zeros_like(rewards))
    rows = torch.arange(len(scores), device=scores.device)
    final = torch.zeros_like(rewards)
    final[rows, last_token_index(response_mask)] = scores.to(rewards.dtype)
    return rewards + final

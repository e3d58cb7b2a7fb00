"""Terms of PPO's loss, per token. Inputs and results are [B, R]; the caller sums and normalizes them.

The terms are not averaged here, so that microbatches of unequal length add up to the gradient of the full minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_terms(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, *, clip_range: float, dual_clip: float | None = None
) -> Tensor:
    """max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c)), https://arxiv.org/abs/1707.06347, equation 7.

    ``dual_clip`` (> 1) bounds the term by -A * dual_clip where A < 0 (https://arxiv.org/abs/1912.09729).
    """
    ratio = (logprobs - rollout_logprobs).exp()
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        terms = torch.where(advantages < 0, torch.minimum(terms, -advantages * dual_clip), terms)
    return terms


def policy_clipped(logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """True where the clip is active, that is, where the token has no gradient."""
    ratio = (logprobs - rollout_logprobs).exp()
    return -advantages * ratio.clamp(1 - clip_range, 1 + clip_range) > -advantages * ratio


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(p / q, ``cap``) for tokens that another engine sampled.

    p is a token's probability under the policy at the start of the update, q its probability under the engine when it was sampled. A loss
    weighted by p / q has the same expectation as over tokens of the policy. The cap bounds the variance and adds a small bias (truncated
    importance sampling). Inputs are log-probabilities; the weight is 1 where they agree.
    """
    return (logprobs - sampler_logprobs).exp().clamp(max=cap)


def value_terms(values: Tensor, rollout_values: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """1/2 max((v - G)^2, (clip(v, v_old - c, v_old + c) - G)^2); without clip_range 1/2 (v - G)^2."""
    squared = (values - returns) ** 2
    if clip_range is not None:
        clipped = rollout_values + (values - rollout_values).clamp(-clip_range, clip_range)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared

"""Estimators of KL(policy || reference) from one sample per token, and the adaptive coefficient. Tensors are [B, R]."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token KL estimate: k1 = d (unbiased, used in the papers), k2 = d^2 / 2, k3 = exp(-d) - 1 + d; d = logprobs - reference_logprobs.

    http://joschu.net/blog/kl-approx.html. Only k1 has an unbiased gradient when used as a reward.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    return (-difference).exp() - 1 + difference


class FixedKLController:
    """A constant coefficient."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        """Does nothing."""


class AdaptiveKLController:
    """Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + e * episodes / horizon."""

    def __init__(self, kl_coef: float, *, target: float, horizon: int) -> None:
        self.value, self.target, self.horizon = kl_coef, target, horizon

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        """``sequence_kl``: KL in nats, summed over tokens, averaged over the sequences of all processes. ``num_episodes``: their number."""
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * num_episodes / self.horizon

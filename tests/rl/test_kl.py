"""KL estimators at known values, and the adaptive controller's path by hand."""

import math

import pytest
import torch

from stages.rl.kl import AdaptiveKLController, FixedKLController, estimate_kl


def test_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    # d = 0.5 and -1; k2 = d^2 / 2; k3 = exp(-d) - 1 + d
    torch.testing.assert_close(estimate_kl(logprobs, reference), torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(estimate_kl(logprobs, reference, estimator="k2"), torch.tensor([[0.125, 0.5]]))
    expected = torch.tensor([[math.exp(-0.5) - 0.5, math.e - 2]])
    torch.testing.assert_close(estimate_kl(logprobs, reference, estimator="k3"), expected)


def test_k1_and_k3_average_to_the_true_kl() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    true = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for estimator in ("k1", "k3"):
        mean = (policy * estimate_kl(policy.log(), reference.log(), estimator=estimator)).sum().item()
        assert mean == pytest.approx(true, rel=1e-5)


@pytest.mark.detail("P5")
def test_the_adaptive_coefficient_moves_by_the_clipped_error() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10_000)
    controller.update(60.0, 512)  # error 9, clipped to 0.2: 0.1 * (1 + 0.2 * 512 / 10000)
    assert controller.value == pytest.approx(0.101024)
    controller.update(5.4, 512)  # error -0.1: * (1 - 0.1 * 0.0512)
    assert controller.value == pytest.approx(0.101024 * (1 - 0.00512))
    controller.update(0.0, 512)  # error -1, clipped to -0.2
    assert controller.value == pytest.approx(0.101024 * (1 - 0.00512) * (1 - 0.01024))


def test_the_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.2)
    controller.update(100.0, 512)
    assert controller.value == 0.2

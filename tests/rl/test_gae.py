"""Generalised advantage estimation, by hand and against the sum of its definition."""

import pytest
import torch

from stages.rl.gae import gae


def test_gae_credits_a_final_reward_backwards() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    # temporal differences are [0, 0, 0.5]; each step back multiplies by gamma * gae_lambda = 0.9
    expected = torch.tensor([[0.405, 0.45, 0.5]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.9)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_lambda_one_gives_the_return_minus_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, -1.0, 3.0]])
    # discounted returns at gamma 0.5: 4; 2 + 2 = 4; 1 + 2 = 3
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[2.5, 5.0, 1.0]]))


@pytest.mark.detail("P6")
def test_padded_batch_equals_its_rows_computed_separately() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    lengths = torch.tensor([6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    garbage = torch.where(mask, 0.0, torch.nan)
    advantages, returns = gae(rewards + garbage, values + garbage, mask, gamma=0.97, gae_lambda=0.8)
    for row, length in enumerate(lengths.tolist()):
        for column in range(length):
            # A_t = sum_l (gamma * lambda)^l * delta_{t+l}, the definition (equation 16)
            expected = 0.0
            for later in range(column, length):
                following = values[row, later + 1].item() if later + 1 < length else 0.0
                delta = rewards[row, later].item() + 0.97 * following - values[row, later].item()
                expected += (0.97 * 0.8) ** (later - column) * delta
            torch.testing.assert_close(advantages[row, column].item(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(returns[row, column].item(), expected + values[row, column].item(), rtol=1e-5, atol=1e-6)
    assert advantages[~mask].abs().max() == 0

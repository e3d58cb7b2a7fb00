"""Advantages without a value network, against numbers worked out by hand."""

import pytest
import torch

from stages.rl.baselines import batch_baseline, group_relative, leave_one_out, spread

RETURNS = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])  # two prompts of three completions


def test_leave_one_out_is_each_return_minus_the_mean_of_the_others() -> None:
    # 1 - (2+6)/2 = -3, 2 - (1+6)/2 = -1.5, 6 - (1+2)/2 = 4.5; equal returns have no advantage
    torch.testing.assert_close(leave_one_out(RETURNS, 3), torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))


def test_group_relative_divides_by_the_unbiased_deviation() -> None:
    # mean 3, deviations -2, -1, 3; variance (4 + 1 + 9) / 2 = 7
    root = 7**0.5
    expected = torch.tensor([-2 / root, -1 / root, 3 / root, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_relative(RETURNS, 3, divide_by_deviation=True), expected)


def test_group_relative_without_the_division() -> None:
    torch.testing.assert_close(group_relative(RETURNS, 3, divide_by_deviation=False), torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]))


def test_batch_baseline_is_the_mean_of_all() -> None:
    # the mean is 24 / 6 = 4
    torch.testing.assert_close(batch_baseline(RETURNS), torch.tensor([-3.0, -2.0, 2.0, 1.0, 1.0, 1.0]))


def test_leave_one_out_is_group_relative_scaled() -> None:
    # R_i - (S - R_i)/(K-1) = K/(K-1) (R_i - S/K)
    torch.testing.assert_close(leave_one_out(RETURNS, 3), 1.5 * group_relative(RETURNS, 3, divide_by_deviation=False))


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_groups_are_independent(shift: float) -> None:
    moved = RETURNS + torch.tensor([0.0, 0, 0, shift, shift, shift])
    for advantages in (leave_one_out, lambda returns, k: group_relative(returns, k, divide_by_deviation=True)):
        torch.testing.assert_close(advantages(moved, 3)[:3], advantages(RETURNS, 3)[:3])


def test_spread_gives_every_token_its_completions_advantage() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(spread(torch.tensor([2.0, -1.0]), mask), torch.tensor([[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("value", [0.1, 5.3, 100.1, -3.7])
@pytest.mark.parametrize("samples", [3, 6, 7])
def test_equal_returns_have_no_advantage(value: float, samples: int) -> None:
    """The mean of seven equal numbers in fp32 can differ from them by one rounding error, and the division would enlarge it to 0.8."""
    returns = torch.cat([torch.full((samples,), value), torch.arange(samples).float()])
    for divide in (True, False):
        advantages = group_relative(returns, samples, divide_by_deviation=divide)
        assert torch.equal(advantages[:samples], torch.zeros(samples)) and advantages[samples:].abs().max() > 0.5
    assert torch.equal(leave_one_out(returns, samples)[:samples], torch.zeros(samples))
    assert torch.equal(batch_baseline(returns[:samples]), torch.zeros(samples))
    almost = returns[:samples] + torch.eye(samples)[0] * abs(value) * 1.2e-7  # one unit in the last place
    assert torch.equal(group_relative(almost, samples, divide_by_deviation=True), torch.zeros(samples))

"""PPO's terms at hand-made points on both sides of each clip, and their gradients."""

import torch

from stages.rl.losses import importance_weights, policy_clipped, policy_terms, value_terms

# ratios 1.5, 0.5, 1.1 under advantages of both signs; clip range 0.2
RATIOS = torch.tensor([1.5, 0.5, 1.1, 1.5, 0.5, 1.1])
ADVANTAGES = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])


def test_policy_terms_by_hand() -> None:
    terms = policy_terms(RATIOS.log(), torch.zeros(6), ADVANTAGES, clip_range=0.2)
    # A > 0: -A * min(ratio, 1.2) = -2.4, -1.0, -2.2; A < 0: 2 * max(ratio, 0.8) = 3.0, 1.6, 2.2
    torch.testing.assert_close(terms, torch.tensor([-2.4, -1.0, -2.2, 3.0, 1.6, 2.2]))


def test_clipped_tokens_give_no_gradient() -> None:
    logprobs = RATIOS.log().requires_grad_()
    policy_terms(logprobs, torch.zeros(6), ADVANTAGES, clip_range=0.2).sum().backward()
    # d(-A * ratio) / d logprob = -A * ratio for tokens that are not clipped: 0, -1, -2.2, 3, 0, 2.2
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -1.0, -2.2, 3.0, 0.0, 2.2]))
    clipped = policy_clipped(RATIOS.log(), torch.zeros(6), ADVANTAGES, clip_range=0.2)
    assert clipped.tolist() == [True, False, False, False, True, False]


def test_dual_clip_bounds_only_negative_advantages() -> None:
    ratio = torch.tensor([10.0, 10.0])
    terms = policy_terms(ratio.log(), torch.zeros(2), torch.tensor([-1.0, 1.0]), clip_range=0.2, dual_clip=3.0)
    torch.testing.assert_close(terms, torch.tensor([3.0, -1.2]))


def test_value_terms_by_hand() -> None:
    values, old, returns = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 1.0])
    # squared: 1, 1, 0.81; clipped values 0.2, 0.2, 0.1 -> 3.24, 0.04, 0.81; half the larger
    torch.testing.assert_close(value_terms(values, old, returns, clip_range=0.2), torch.tensor([1.62, 0.5, 0.405]))
    torch.testing.assert_close(value_terms(values, old, returns, clip_range=None), torch.tensor([0.5, 0.5, 0.405]))


def test_raising_the_probability_of_a_good_token_lowers_the_loss() -> None:
    low, high = (policy_terms(torch.tensor([x]), torch.zeros(1), torch.tensor([1.0]), clip_range=0.2) for x in (-0.05, 0.05))
    assert high < low


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    """p / q for p = 0.2, 0.5, 0.9 and q = 0.4, 0.5, 0.1: 0.5, 1 and 9, of which a cap of 2 leaves 2."""
    p, q = torch.tensor([0.2, 0.5, 0.9]).log(), torch.tensor([0.4, 0.5, 0.1]).log()
    torch.testing.assert_close(importance_weights(p, q, cap=2.0), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(importance_weights(p, q, cap=10.0), torch.tensor([0.5, 1.0, 9.0]))

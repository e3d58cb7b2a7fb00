"""Per-token rewards: the score at the last counted token, KL at every token, and the penalty for a missing end token."""

import pytest
import torch

from stages.rl.shaping import last_token_index, penalize_length, penalize_missing_eos, shape_rewards

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_last_token_is_the_last_counted_position() -> None:
    assert last_token_index(MASK).tolist() == [2, 0]


def test_rewards_by_hand() -> None:
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, torch.nan, torch.inf]])
    rewards = shape_rewards(torch.tensor([10.0, -5.0]), kl, MASK, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 9.7], [-5.4, 0.0, 0.0]]))


def test_token_scores_are_added_to_the_rewards() -> None:
    rewards = shape_rewards(torch.zeros(2), torch.zeros(2, 3), MASK, kl_coef=1.0, token_scores=torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert rewards.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_length_penalty_is_subtracted_for_each_token() -> None:
    assert penalize_length(torch.tensor([1.0, 1.0]), torch.tensor([2, 4]), penalty=0.125).tolist() == [0.75, 0.5]


@pytest.mark.detail("P25")
def test_missing_eos_replaces_or_reduces_the_score() -> None:
    scores, stopped = torch.tensor([0.5, 0.5]), torch.tensor([True, False])
    assert penalize_missing_eos(scores, stopped, how="none", penalty=1.0).tolist() == [0.5, 0.5]
    assert penalize_missing_eos(scores, stopped, how="replace", penalty=1.0).tolist() == [0.5, -1.0]
    assert penalize_missing_eos(scores, stopped, how="subtract", penalty=1.0).tolist() == [0.5, -0.5]

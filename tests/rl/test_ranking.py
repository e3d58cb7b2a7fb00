"""InstructGPT's ranking loss: by hand, ties dropped, and a prompt's weight independent of its K."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.rl.ranking import best_of_losses, ranking_loss, ranking_pairs


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


class Largest(TorchDispatchMode):
    """Records the number of values of the largest tensor that is made inside."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


def test_pairs_of_many_prompts_take_memory_for_the_combinations_within_prompts_only() -> None:
    with Largest() as largest:
        better, worse = ranking_pairs(torch.tensor([1, 0] * 500), torch.arange(500).repeat_interleave(2))
    assert better.tolist() == list(range(1, 1000, 2)) and worse.tolist() == list(range(0, 1000, 2))
    assert largest.values == 500 * 2 * 2


def test_completions_of_a_prompt_need_not_be_adjacent() -> None:
    better, worse = ranking_pairs(torch.tensor([2, 0, 1, 1]), torch.tensor([7, 3, 7, 3]), torch.tensor([0, 0, 1, 0]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(2, 0)]  # 1 and 3 are equal texts


@pytest.mark.detail("R4")
def test_pairs_leave_out_ties_and_other_prompts() -> None:
    better, worse = ranking_pairs(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2)]


def test_the_loss_by_hand() -> None:
    # prompt 0: K = 3 without ties, three pairs, margins 1, 3, 2; prompt 1: K = 2, one pair, margin -1
    scores, ranks, prompts = torch.tensor([3.0, 2.0, 0.0, 1.0, 2.0]), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    first = -(logsigmoid(1) + logsigmoid(3) + logsigmoid(2)) / 3
    assert ranking_loss(scores, ranks, prompts).item() == pytest.approx((first - logsigmoid(-1)) / 2)


def test_equal_scores_cost_log_two_for_any_k() -> None:
    for k in (2, 4, 9):
        loss = ranking_loss(torch.zeros(k), torch.arange(k), torch.zeros(k, dtype=torch.long))
        assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.detail("R4")
def test_prompt_with_only_ties_does_not_change_the_mean() -> None:
    scores, ranks, prompts = torch.tensor([1.0, 0.0, 5.0, 9.0]), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    assert ranking_loss(scores, ranks, prompts).item() == pytest.approx(-logsigmoid(1))
    only_ties = torch.tensor([5.0, 9.0], requires_grad=True)
    loss = ranking_loss(only_ties, torch.zeros(2), torch.zeros(2))
    loss.backward()
    assert loss.item() == 0 and only_ties.grad.abs().sum() == 0


def test_gradient_raises_the_better_score() -> None:
    scores = torch.zeros(2, requires_grad=True)
    ranking_loss(scores, torch.tensor([1, 0]), torch.zeros(2)).backward()
    assert scores.grad.tolist() == [0.5, -0.5]  # the second is preferred; sigmoid(0) = 1/2


def test_best_of_loss_is_a_softmax_over_the_scores() -> None:
    # softmax of (0, 0, 0, log 3) gives the last 3/6
    scores = torch.tensor([0.0, 0.0, 0.0, math.log(3)])
    assert best_of_losses(scores, torch.tensor([1, 1, 1, 0]), torch.zeros(4)).tolist() == pytest.approx([math.log(2)])


@pytest.mark.detail("R5")
def test_best_of_ranked_completions_by_hand() -> None:
    # prompt 0: the published case r = (1, 0, 0, 0), best first: log(e + 3) - 1; prompt 1: two equally best of three, scores 0
    scores, ranks = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([0, 1, 2, 2, 0, 0, 1])
    prompts = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    first = math.log(math.e + 3) - 1
    assert first == pytest.approx(0.743668, abs=1e-6)
    assert best_of_losses(scores, ranks, prompts).tolist() == pytest.approx([first, math.log(3)])
    ties = torch.tensor([5.0, 9.0], requires_grad=True)
    losses = best_of_losses(ties, torch.zeros(2), torch.zeros(2))
    losses.sum().backward()
    assert len(losses) == 0 and ties.grad.abs().sum() == 0

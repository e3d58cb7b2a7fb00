"""Masked reductions: numbers by hand, and values under the mask have no effect, not even infinity."""

import pytest
import torch

from stages.rl.masking import masked_mean, masked_variance, scale_to_unit_variance, whiten

X = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_reductions_by_hand() -> None:
    assert masked_mean(X, MASK).item() == 2  # 6 / 3
    assert masked_variance(X, MASK).item() == pytest.approx(2 / 3)  # ((-1)^2 + 0 + 1^2) / 3


def test_empty_mask_gives_zero() -> None:
    assert masked_mean(X, torch.zeros_like(MASK)).item() == 0


def test_whitening_by_hand() -> None:
    # counted: 1, 2, 3 with mean 2 and biased variance 2/3: (1 - 2) / sqrt(2/3) = -1.2247449
    torch.testing.assert_close(whiten(X, MASK), torch.tensor([[-1.2247449, 0, 0], [1.2247449, 0, 0]]))
    # the mean of 2 is kept
    torch.testing.assert_close(scale_to_unit_variance(X, MASK), torch.tensor([[0.7752551, 2, 0], [3.2247449, 0, 0]]))


@pytest.mark.parametrize("reduce", [masked_mean, masked_variance, whiten, scale_to_unit_variance])
@pytest.mark.parametrize("garbage", [float("inf"), float("nan"), 1e30])
def test_garbage_under_the_mask_changes_nothing(reduce, garbage) -> None:
    spoiled = torch.where(MASK, X, torch.tensor(garbage)).requires_grad_()
    result = reduce(spoiled, MASK)
    torch.testing.assert_close(result, reduce(X, MASK))
    result.sum().backward()
    assert torch.isfinite(spoiled.grad).all()


def test_equal_values_whiten_to_zero() -> None:
    assert whiten(torch.full((2, 3), 5.0), MASK).abs().max() == 0

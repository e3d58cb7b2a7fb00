"""Log-probabilities and entropy of small distributions worked out by hand."""

import math

import pytest
import torch

from stages.rl.logprobs import entropy, token_logprobs

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 7.0  # adding a constant must not change the result


def test_logprobs_by_hand() -> None:
    logprobs = token_logprobs(LOGITS, torch.tensor([1, 2]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25), math.log(0.8)]))


def test_temperature_divides_the_logits() -> None:
    # at temperature 1/2 the probabilities are squared and renormalised: 0.25 / (0.25 + 0.0625 * 2) = 2/3
    logprobs = token_logprobs(LOGITS[:1], torch.tensor([0]), temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(2 / 3))


def test_entropy_by_hand() -> None:
    assert entropy(LOGITS)[0].item() == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))


def test_half_precision_logits_are_widened_first() -> None:
    logits = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 20).bfloat16()
    tokens = torch.tensor([0, 1, 2, 3])
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(token_logprobs(logits, tokens).double(), expected, rtol=1e-5, atol=1e-4)

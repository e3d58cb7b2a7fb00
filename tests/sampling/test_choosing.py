"""Choosing tokens: shares of a distribution by hand, tokens with weight 0, and log-probabilities of the chosen tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stages.sampling.choosing import invert_cumulative, sample_tokens

PROBABILITIES = torch.tensor([0.5, 0.2, 0.2, 0.1])
NOISE = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # every thousandth of [0, 1)


def shares(**settings: Any) -> list[float]:
    tokens, _ = sample_tokens(PROBABILITIES.log().expand(1000, 4), NOISE, **settings)
    return [round(x, 3) for x in (torch.bincount(tokens, minlength=4) / 1000).tolist()]


def test_sampled_shares_follow_the_distribution() -> None:
    assert shares() == [0.5, 0.2, 0.2, 0.1]
    assert shares(temperature=0.0) == [1.0, 0.0, 0.0, 0.0]
    assert shares(top_k=1) == [1.0, 0.0, 0.0, 0.0]
    assert shares(top_p=0.5) == [1.0, 0.0, 0.0, 0.0]
    # 0.5 + 0.2 reach 0.6: two tokens stay, 5/7 and 2/7
    assert shares(top_p=0.6) == [0.714, 0.286, 0.0, 0.0]
    # squared: 0.25, 0.04, 0.04, 0.01 of 0.34
    assert shares(temperature=0.5) == [0.735, 0.118, 0.118, 0.029]


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1000, 4096])
def test_two_level_search_equals_a_plain_search(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weights = torch.rand(500, width, generator=generator) ** 8
    weights[:, ::3] = 0.0
    weights[:, width // 2] += 0.1
    noise = torch.rand(500, generator=generator, dtype=torch.float64)
    actual, total = invert_cumulative(weights, noise)
    cumulative = weights.double().cumsum(-1)
    expected = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(total, weights.double().sum(-1), rtol=1e-6, atol=0)  # blocks of 64 are summed in fp32


def test_a_token_without_weight_is_never_chosen() -> None:
    weights = torch.zeros(4, 200)
    weights[:, 70], weights[:, 130] = 1e-30, 1.0
    ends = torch.tensor([0.0, 1e-40, math.nextafter(1.0, 0.0), 1.0], dtype=torch.float64)
    assert invert_cumulative(weights, ends)[0].tolist() == [70, 70, 130, 130]


def test_logprobs_are_those_before_truncation() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    for settings, temperature in (
        ({}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.4}, 1.0),
        ({"temperature": 0.0}, 1.0),
    ):
        tokens, logprobs = sample_tokens(logits, torch.rand(64, generator=torch.Generator().manual_seed(1)).double(), **settings)
        expected = (logits / temperature).log_softmax(-1)[torch.arange(64), tokens]
        torch.testing.assert_close(logprobs, expected)

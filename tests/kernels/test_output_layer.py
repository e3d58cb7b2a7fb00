"""Losses at the output layer against plain autograd over full logits. Chunks and values under the mask change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels import output_layer
from stages.kernels.output_layer import chosen_logprobs, summed_loss

N, D, V = 23, 8, 50


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((N, D), (V, D), (V,)))
    tokens = torch.randint(V, (N,), generator=generator)
    return hidden, weight, bias, tokens


def test_two_tokens_by_hand() -> None:
    # logits (0, log 3): probabilities 1/4 and 3/4; entropy (log 4) / 4 + 3/4 log(4/3)
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropies = chosen_logprobs(hidden, weight, None, torch.tensor([0]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(entropies, torch.tensor([0.25 * math.log(4) + 0.75 * math.log(4 / 3)]))
    # d logprob / d logits = (1 - 1/4, -3/4); times hidden = 1
    weight.requires_grad_()
    loss, _, _ = summed_loss(hidden, weight, None, torch.tensor([0]), lambda logprobs, entropies, rows: 2 * logprobs)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 6 * torch.tensor([[0.75], [-0.75]]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_equal_autograd_over_full_logits(inputs, monkeypatch, temperature, with_bias, chunk) -> None:
    monkeypatch.setitem(output_layer.CHUNK_BYTES, "cpu", 4 * V * chunk)
    hidden, weight, bias, tokens = inputs
    scale = torch.linspace(-2, 2, N)

    def term(logprobs: torch.Tensor, entropies: torch.Tensor, rows: slice) -> torch.Tensor:
        return scale[rows] * (logprobs + 1).exp() - 0.3 * entropies  # both contribute, and the gradient differs between positions

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + (leaves[2] if with_bias else 0.0)) / temperature
    log_softmax = logits.log_softmax(-1)
    logprobs, entropies = log_softmax[torch.arange(N), tokens], -(log_softmax.exp() * log_softmax).sum(-1)
    expected = term(logprobs, entropies, slice(0, N)).sum()
    expected.backward()
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, found_logprobs, found_entropies = summed_loss(
        ours[0], ours[1], ours[2] if with_bias else None, tokens, term, temperature=temperature
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found_logprobs, logprobs)
    torch.testing.assert_close(found_entropies, entropies)
    for one, two in zip(ours[: 3 if with_bias else 2], leaves, strict=False):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)  # sums of N terms of order one
    plain = chosen_logprobs(hidden, weight, bias if with_bias else None, tokens, temperature=temperature)
    torch.testing.assert_close(plain[0], logprobs)
    torch.testing.assert_close(plain[1], entropies)


def test_frozen_tensors_get_no_gradient(inputs) -> None:
    hidden, weight, bias, tokens = inputs
    hidden.requires_grad_()
    loss, logprobs, _ = summed_loss(hidden, weight, bias, tokens, lambda logprobs, entropies, rows: logprobs)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None and not logprobs.requires_grad


def test_tokens_of_probability_zero_give_no_nan(inputs) -> None:
    hidden, weight, _, tokens = inputs
    bias = torch.zeros(V)
    bias[0] = -torch.inf
    tokens = tokens.clamp(min=1)
    weight.requires_grad_()
    loss, logprobs, entropies = summed_loss(hidden, weight, bias, tokens, lambda logprobs, entropies, rows: logprobs + entropies)
    loss.backward()
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropies).all() and torch.isfinite(weight.grad).all()
    log_softmax = (hidden @ weight.detach().T)[:, 1:].log_softmax(-1)
    torch.testing.assert_close(entropies, -(log_softmax.exp() * log_softmax).sum(-1))


def test_no_positions_give_empty_results(inputs) -> None:
    hidden, weight, bias, _ = inputs
    nothing = torch.zeros(0, dtype=torch.long)
    assert chosen_logprobs(hidden[:0], weight, bias, nothing)[0].shape == (0,)
    loss, _, _ = summed_loss(hidden[:0].requires_grad_(), weight, bias, nothing, lambda logprobs, entropies, rows: logprobs)
    loss.backward()
    assert float(loss) == 0.0


def test_autocast_computes_in_its_own_dtype(inputs) -> None:
    hidden, weight, bias, tokens = inputs
    fp32, _ = chosen_logprobs(hidden, weight, bias, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = chosen_logprobs(hidden, weight, bias, tokens)
        trained = weight.clone().requires_grad_()
        loss, _, _ = summed_loss(hidden, trained, bias, tokens, lambda logprobs, entropies, rows: logprobs)
        loss.backward()
    assert rounded.dtype == torch.float32 and trained.grad.dtype == torch.float32
    assert not torch.equal(rounded, fp32)
    torch.testing.assert_close(rounded, fp32, rtol=0, atol=0.1)  # logits of about 10 with 8 bits: steps of 1/16

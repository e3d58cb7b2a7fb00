"""The lean layers equal plain operations in double precision, with gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.kernels.lean import gated_mlp, rms_norm


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 0.1)


def plain_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    first = x @ gate.T
    return (first / (1 + torch.exp(-first)) * (x @ up.T)) @ down.T


def same_with_gradients(lean: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], trained: list[bool]) -> None:
    double = [value.clone().requires_grad_(wanted) for value, wanted in zip(inputs, trained, strict=True)]
    single = [value.float().requires_grad_(wanted) for value, wanted in zip(inputs, trained, strict=True)]
    expected, actual = plain(*double), lean(*single)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(upstream)
    actual.backward(upstream.float())
    for ours, theirs, wanted in zip(single, double, trained, strict=True):
        assert (ours.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("trained", [[True, True], [True, False], [False, True]])
def test_rms_norm_equals_the_formula_with_its_gradients(shape: tuple[int, ...], trained: list[bool]) -> None:
    same_with_gradients(lambda x, weight: rms_norm(x, weight, 0.1), plain_norm, draws(shape, (8,)), trained)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
@pytest.mark.parametrize("trained", [[True] * 4, [True, False, False, False], [False, True, True, True], [False, False, False, True]])
def test_gated_mlp_equals_the_formula_with_its_gradients(shape: tuple[int, ...], trained: list[bool]) -> None:
    same_with_gradients(gated_mlp, plain_mlp, draws(shape, (12, 8), (12, 8), (8, 12)), trained)


def test_saved_tensors_are_not_changed_by_the_backward_pass() -> None:
    """The backward pass works in place. With a retained graph, a second backward pass gives the same gradients."""
    inputs = [value.float().requires_grad_() for value in draws((5, 8), (12, 8), (12, 8), (8, 12), (8,))]
    x, *weights, scale = inputs
    loss = gated_mlp(rms_norm(x, scale, 0.1), *weights).square().sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_saved_tensors_for_the_backward_pass() -> None:
    """Besides its inputs, a feed-forward layer saves two products, and a norm saves one number per token."""
    x, gate, up, down, scale = (value.float().requires_grad_() for value in draws((5, 8), (12, 8), (12, 8), (8, 12), (8,)))
    own, kept = {tensor.data_ptr() for tensor in (x, gate, up, down, scale)}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_mlp(x, gate, up, down)
        assert kept == [5 * 12, 5 * 12]
        kept.clear()
        rms_norm(x, scale, 0.1)
        assert kept == [5]

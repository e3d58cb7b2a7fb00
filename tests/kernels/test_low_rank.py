"""Layers with low-rank updates equal plain operations in double precision, with gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.kernels.casts import kept_casts
from stages.kernels.low_rank import Update, UpdatedLayer, updated_layers

WIDTH, SIZES = 6, (5, 3)  # inputs; outputs of two layers
RANKS = {  # rank and scaling of the adapters, for each part of the tokens
    "one adapter": [[(2, 1.5)]],
    "two adapters": [[(2, 0.5), (1, 3.0)]],
    "two parts": [[(2, 2.0)], [(2, 2.0)]],
    "two parts, one of them with more": [[(1, 0.5), (2, 2.0)], [(1, 3.0)]],
    "two parts, one of them without any": [[], [(2, 0.5)]],
}


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Case:
    """An input [2, 4, d], two layers and their adapters, as double and single precision."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape: int, trained: bool = True) -> Tensor:
            return drawn(generator, *shape).to(dtype).requires_grad_(trained)

        self.x = leaf(2, 4, WIDTH)
        self.weights = [leaf(size, WIDTH, trained=False) for size in SIZES]
        self.bias = leaf(SIZES[0], trained=False)
        self.factors = [
            [[(leaf(rank, WIDTH), leaf(size, rank), scaling) for rank, scaling in part] for part in RANKS[kind]] for size in SIZES
        ]

    def plain(self) -> list[Tensor]:
        outputs = []
        for weight, parts in zip(self.weights, self.factors, strict=True):
            halves = self.x.chunk(len(parts))
            updated = [
                half @ weight.T + sum((s * half @ a.T @ b.T for a, b, s in part), start=0.0)
                for half, part in zip(halves, parts, strict=True)
            ]
            outputs.append(torch.cat(updated))
        outputs[0] = outputs[0] + self.bias
        return outputs

    def folded(self, by_output: bool) -> tuple[Tensor, ...]:
        """The first layer has a weight; the second one a weight, or an output that autograd computed."""
        parts = [tuple(tuple(Update(a, b, s) for a, b, s in part) for part in layer) for layer in self.factors]
        first = UpdatedLayer(parts[0], self.weights[0], self.bias)
        second = UpdatedLayer(parts[1], output=self.x @ self.weights[1].T) if by_output else UpdatedLayer(parts[1], self.weights[1])
        return updated_layers(self.x, [first, second], self.x.dtype)

    def gradients(self, outputs: list[Tensor] | tuple[Tensor, ...], used: slice) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        upstream = [drawn(generator, *output.shape).to(output.dtype) for output in outputs]
        torch.autograd.backward(list(outputs)[used], upstream[used])
        leaves = [self.x, *(factor for layer in self.factors for part in layer for a, b, _ in part for factor in (a, b))]
        return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("used", [slice(None), slice(1, 2)], ids=["both outputs", "the second output"])
@pytest.mark.parametrize("by_output", [False, True], ids=["weights", "an output"])
@pytest.mark.parametrize("kind", RANKS)
def test_outputs_and_gradients_equal_those_of_separate_operations(kind: str, by_output: bool, used: slice) -> None:
    precise, single = Case(kind, torch.float64), Case(kind, torch.float32)
    expected, actual = precise.plain(), single.folded(by_output)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(single.gradients(actual, used), precise.gradients(expected, used), strict=True):
        theirs = torch.zeros_like(ours, dtype=torch.float64) if theirs is None and ours is not None else theirs
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for ours, theirs in zip(single.folded(by_output), actual, strict=True):
            assert torch.equal(ours, theirs)


def test_stacked_weights_are_made_once_per_optimizer_step_and_belong_to_their_layers() -> None:
    case = Case("one adapter", torch.float32)
    for layer in case.factors:
        for part in layer:
            part[:] = [(torch.nn.Parameter(a.detach()), torch.nn.Parameter(b.detach()), s) for a, b, s in part]
    swapped = [UpdatedLayer(((Update(*case.factors[index][0][0]),),), output=torch.zeros(2, 4, SIZES[index])) for index in (1, 0)]
    with torch.no_grad(), kept_casts("cpu"):
        before = case.folded(False)
        with torch.profiler.profile() as profile:
            again = case.folded(False)
        second, first = updated_layers(case.x, swapped, torch.float32)  # the same adapters in another order
    assert not [event for event in profile.events() if event.name == "aten::cat"]
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
    bases = [case.x @ weight.T for weight in case.weights]
    torch.testing.assert_close(first + bases[0] + case.bias, before[0])
    torch.testing.assert_close(second + bases[1], before[1])
    with torch.no_grad():
        case.factors[0][0][0][1].zero_()
        assert not torch.equal(case.folded(False)[0], before[0])  # no cast or stack remains afterwards


def test_under_half_precision_the_gradients_have_the_dtypes_of_their_weights() -> None:
    case = Case("two adapters", torch.float32)
    layers = [UpdatedLayer(tuple(tuple(Update(*one) for one in part) for part in case.factors[0]), case.weights[0], case.bias)]
    (output,) = updated_layers(case.x, layers, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    expected = Case("two adapters", torch.float64)
    expected.plain()[0].sum().backward()
    for ours, theirs in zip((case.x, *case.factors[0][0][0][:2]), (expected.x, *expected.factors[0][0][0][:2]), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0.05, atol=0.2)

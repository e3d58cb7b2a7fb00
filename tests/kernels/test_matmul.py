"""Products by oneDNN and their gradients equal PyTorch's. Inputs that oneDNN does not support use PyTorch's products."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.kernels import matmul
from stages.kernels.matmul import Linear, linear, measure_peak, product, scaled_product, use_fast_matmuls


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN, as on a processor where it is faster."""
    if not matmul._onednn_works():
        pytest.skip("this build of PyTorch has no oneDNN linear operator")
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 1, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_and_its_gradients(onednn, shape, with_bias) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (6, 8), (6,)))
    upstream = torch.randn(*shape[:-1], 6, generator=generator)
    actual, expected = [], []
    for function, out in ((linear, actual), (functional.linear, expected)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        made = function(leaves[0], leaves[1], leaves[2] if with_bias else None)
        made.backward(upstream)
        out += [made, *(leaf.grad for leaf in leaves[: 3 if with_bias else 2])]
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_an_output_can_be_changed_in_place(onednn) -> None:
    """Gemma 3n multiplies a part of a linear layer's output in place."""
    x, weight = torch.randn(2, 3, 8), torch.randn(6, 8)
    gradients = []
    for function in (linear, functional.linear):
        leaf = x.clone().requires_grad_()
        made = function(leaf, weight)
        made[..., :2] *= 3.0
        made.sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_strided_and_transposed_operands(onednn) -> None:
    a, b = torch.randn(7, 10)[:, ::2], torch.randn(4, 5).T
    torch.testing.assert_close(product(a, b), a @ b)
    x = torch.randn(4, 3, 5).transpose(0, 1)[:, 1:]
    torch.testing.assert_close(linear(x, b.T), x @ b)


def with_gaps(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]]


LAYOUTS = {
    "dense": torch.clone,
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "columns of a larger matrix": with_gaps,
    "transposed columns of a larger matrix": lambda matrix: with_gaps(matrix.T.contiguous()).T,
    "every second row": lambda matrix: matrix.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 12])  # fewer and more than the seven columns of the product
def test_the_operator_never_gets_a_weight_with_gaps(onednn, monkeypatch: pytest.MonkeyPatch, first: str, second: str, rows: int) -> None:
    # With such a weight, the operator was 300 times as slow for the adapters of queries, keys and values.
    given: list[torch.Tensor] = []
    operator = torch.ops.mkldnn._linear_pointwise

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        given.append(weight)
        return operator(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    generator = torch.Generator().manual_seed(0)
    a, b = LAYOUTS[first](torch.randn(rows, 5, generator=generator)), LAYOUTS[second](torch.randn(5, 7, generator=generator))
    expected = a.double() @ b.double()
    made = {
        "product": product(a, b),
        "scaled": scaled_product(a, b, 2.0) / 2,
        "linear": linear(a, b.T),
    }
    for one in made.values():
        torch.testing.assert_close(one.double(), expected, atol=1e-5, rtol=1e-5)
    assert len(given) == 3
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in given)


def test_frozen_operands_get_no_gradient(onednn) -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))
    frozen, trained = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    linear(frozen, trained).sum().backward()
    torch.testing.assert_close(trained.grad, frozen.sum(0).expand(2, 4))


@pytest.mark.parametrize("case", ["bf16", "fp64", "autocast", "empty"])
def test_unsupported_inputs_use_pytorchs_linear(onednn, monkeypatch, case) -> None:
    monkeypatch.setattr(matmul, "_onednn", lambda *_: pytest.fail("oneDNN was asked"))
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(case, torch.float32)
    x, weight = torch.randn(0 if case == "empty" else 3, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_layers_keep_their_parameters_and_names(onednn) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plain, x = copy.deepcopy(model), torch.randn(3, 4)
    use_fast_matmuls(model)
    assert type(model[0]) is Linear and isinstance(model[0], nn.Linear)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(x), plain(x))


def test_measured_peak_is_a_plausible_speed() -> None:
    assert 1e6 < measure_peak(torch.float32, torch.device("cpu"), size=64) < 1e14  # a busy machine measures 5e7


RAGGED = """
import psutil, torch
from stages.kernels import matmul
from stages.process.runtime import Runtime
torch.set_num_threads(1)
Runtime(quiet=True)
weight, held = torch.randn(128, 128), []
for length in range(1, 801):  # every length is another shape
    matmul._onednn(torch.randn(length, 128), weight)
    if length % 400 == 0:
        held.append(psutil.Process().memory_info().rss / 2**20)
print(held[1] - held[0])
"""


def test_new_shapes_do_not_accumulate_compiled_kernels(onednn) -> None:
    made = subprocess.run([sys.executable, "-c", RAGGED], capture_output=True, text=True, check=True)
    assert float(made.stdout.splitlines()[-1]) < 8  # MiB; what oneDNN and PyTorch keep by default of 400 shapes is several times that

"""Matrix products with the fastest library for the processor. x [..., K], weight [N, K], bias [N].

On a CPU, PyTorch computes fp32 products with MKL, which uses only half of the vector width of AMD processors with AVX-512. oneDNN, which is
part of PyTorch, uses all of it (2.1 to 2.4 times as fast on a Zen 5 core). On other processors and for other dtypes PyTorch's own functions
are used.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

PLAIN = (Tensor, nn.Parameter)
PEAK_SECONDS = 0.01  # of one measurement of the peak, if its products are fast enough


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN's fp32 products are faster here. Decided by the processor type, not by timing, so that equal runs give equal bits."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return is_amd and _onednn_works()


def _onednn_works() -> bool:
    """Whether the operator exists and computes correctly. It is part of PyTorch, but not of its public interface."""
    x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        return torch.equal(_onednn(x, weight, bias), functional.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. A weight with gaps between its rows is copied, because it makes the operator hundreds of times as slow."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes(a: Tensor, b: Tensor) -> bool:
    """Whether to use oneDNN for these tensors."""
    return are_plain(a, b) and prefers_onednn()


def are_plain(*tensors: Tensor) -> bool:
    """Whether all are non-empty plain fp32 CPU tensors, outside autocast, compilation and sharding."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a plain loop, because every product calls this
        if type(tensor) not in PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu or tensor.numel() == 0:
            return False
    return not torch.is_autocast_enabled("cpu")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices, without gradient."""
    if not _takes(a, b):
        return a @ b
    # The operator copies a transposed first operand. Of the two equivalent forms, use the one that copies less.
    turn = not a.is_contiguous() and b.shape[1] < a.shape[0]
    return _onednn(b.T, a).T if turn else _onednn(a, b.T)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b for matrices, without gradient. ``b`` may be some columns of a larger matrix."""
    if _takes(a, b):
        made = product(a, b)
        return made if scaling == 1.0 else made.mul_(scaling)
    if scaling == 1.0:
        return a @ b
    # With beta 0 the old content is not read, so this is one product with a scale.
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scaling)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for matrices, in place, without gradient."""
    if _takes(a, b):
        total.add_(product(a, b))
    else:
        total.addmm_(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, differentiable."""
    if not _takes(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    return _onednn(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class Context(Protocol):
    """The context of an autograd function, as far as this project uses it; PyTorch's class does not declare these attributes.

    ``needs_input_grad``: one entry per input of the forward pass.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _ShapeContext(Context, Protocol):
    shape: torch.Size


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ShapeContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        # Not a view for autograd, because a model may change the result in place (Gemma 3n).
        return torch.ops.aten._unsafe_view(_onednn(flat, weight, bias), [*x.shape[:-1], len(weight)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _ShapeContext, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight = ctx.saved_tensors
        gradient = upstream[0].reshape(-1, len(weight))
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_x = _onednn(gradient, weight.T).view(ctx.shape) if wants_x else None
        of_weight = product(gradient.T, flat) if wants_weight else None
        return of_x, of_weight, gradient.sum(dim=0) if wants_bias else None


class Linear(nn.Linear):
    """``nn.Linear`` computed with ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_fast_matmuls(model: nn.Module, others: Mapping[type[nn.Module], type[nn.Module]] | None = None) -> Counter[str]:
    """Make the linear layers of ``model`` compute with ``linear``. Parameters, names and the saved form do not change.

    ``others``: additional layer classes, each with its replacement subclass. Does nothing if PyTorch's own products are the fastest.
    Returns the number of replaced layers per class.
    """
    switched: Counter[str] = Counter()
    if prefers_onednn():
        replaced: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, **(others or {})}
        for module in model.modules():
            if type(module) in replaced:
                switched[type(module).__name__] += 1
                module.__class__ = replaced[type(module)]
    return switched


def measure_peak(dtype: torch.dtype, device: torch.device, *, size: int | None = None) -> float:
    """Peak flops per second of a large square matrix product, the best of several measurements.

    A measurement has several products if they are fast: on a GPU, their start takes as long as a tenth of a product. The matrices take
    96 MiB of a GPU in half precision. Measure before models are loaded: then this memory adds nothing to the peak of a step.
    """
    on_gpu = device.type == "cuda"
    size = size or (4096 if on_gpu else 1024)
    generator = torch.Generator(device).manual_seed(0)  # so that the step's random numbers do not depend on this
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else (lambda: None)
    best, spent, number = float("inf"), 0.0, 1
    for _ in range(6):
        wait()
        began = time.perf_counter()
        for _ in range(number):
            product(a, b)
        wait()
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds / number), spent + seconds
        number = max(1, min(10, int(PEAK_SECONDS / best)))
        if spent > 100 * PEAK_SECONDS:
            break
    return 2 * size**3 / best

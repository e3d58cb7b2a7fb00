"""Casts of weights that are kept for several passes, and only for them."""

from __future__ import annotations

import torch

from stages.kernels.casts import cast, kept_casts


def test_parameter_is_cast_once_inside_the_context_and_again_after_it() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    with kept_casts("cpu"):
        first = cast(weight, torch.bfloat16)
        assert cast(weight, torch.bfloat16) is first and not first.requires_grad
        assert cast(weight, torch.float16).dtype == torch.float16
        assert cast(weight, torch.float32).data_ptr() == weight.data_ptr()
        made = weight * 2  # not a parameter: it is cast again in every pass
        assert cast(made, torch.bfloat16) is not cast(made, torch.bfloat16)
    with torch.no_grad():
        weight += 1
    with kept_casts("cpu"):
        assert cast(weight, torch.bfloat16).tolist() == [2.0, 3.0]
    assert cast(weight, torch.bfloat16) is not cast(weight, torch.bfloat16)


def test_gradients_of_several_passes_go_through_one_cast() -> None:
    layer = torch.nn.Linear(4, 3, bias=False)
    inputs = [torch.randn(2, 4) for _ in range(3)]
    gradients = []
    for keeps in (False, True):
        layer.zero_grad()
        with kept_casts("cpu") if keeps else torch.autocast("cpu", enabled=False):
            for x in inputs:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = layer(x).float().square().sum()
                loss.backward()
                assert not torch.is_autocast_enabled("cpu")  # only the passes compute in bf16
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def test_backward_passes_stay_in_the_thread_whose_casts_are_kept() -> None:
    assert torch._C._is_multithreading_enabled()
    with kept_casts("cpu"):
        assert not torch._C._is_multithreading_enabled()  # tests/pretend_gpu counts the casts of a device with another thread
    assert torch._C._is_multithreading_enabled()

"""Tensors that are moved together keep their shapes and values."""

from __future__ import annotations

import torch

from stages.kernels.transfers import moved_together, on_device


def test_moved_tensors_keep_shape_and_dtype() -> None:
    # The meta device stands for a GPU: the tensors are joined, moved and divided again.
    moved = moved_together([torch.zeros(2, 3), torch.zeros(()), torch.zeros(4)], "meta")
    assert [tuple(tensor.shape) for tensor in moved] == [(2, 3), (), (4,)]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert {tensor.dtype for tensor in moved} == {torch.float32}


def test_tensors_on_the_cpu_stay_the_same_objects() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([[3]])
    moved = moved_together([first, second], torch.device("cpu"))
    assert moved[0] is first and moved[1] is second
    assert on_device(first, torch.device("cpu")) is first

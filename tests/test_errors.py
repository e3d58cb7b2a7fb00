"""Recognizing that memory ran out, by class, error number or message."""

from __future__ import annotations

import errno

import numpy
import pytest
import torch
from safetensors import SafetensorError

from stages.errors import is_out_of_memory


class OutOfMemoryError(Exception):
    """Named as torch, CuPy and others name theirs."""


def refused_by_torch() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


def refused_by_numpy() -> BaseException:
    with pytest.raises(MemoryError) as caught:
        numpy.empty(1 << 50)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("no message"),
        torch.OutOfMemoryError("no message"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"),
        refused_by_torch(),
        refused_by_numpy(),
        RuntimeError("unable to mmap 12 bytes from file <model>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_out_of_memory_is_recognized_on_every_device(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOSPC, "No space left")], ids=str
)
def test_other_errors_are_no_lack_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)

"""Copies of weights in autocast's dtype that keep their addresses over many decoding steps.

Autocast casts a weight again in every forward pass, or keeps the cast until the outermost autocast context ends. A CUDA graph that is
replayed later needs copies that stay in memory. After the weights change, the copies must be updated at the same addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class AutocastCopies:
    """Copies of the weights of linear layers. A parameter that several layers share has one copy."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.Size, torch.dtype], nn.Parameter] = {}

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Inside this context, linear layers with fp32 weights compute with copies in autocast's dtype.

        The copies are updated on entry. Without autocast there are no copies. The results are bitwise equal to those of plain autocast. Use
        it only for forward passes without gradients.
        """
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        kind = next(model.parameters()).device.type
        try:
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
                refreshed: set[tuple[int, torch.Size, torch.dtype]] = set()
                for module, name, parameter in casted_parameters(model):
                    replaced.append((module, name, parameter))
                    module._parameters[name] = self._copy(parameter, dtype, refreshed)
            yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter

    def num_bytes(self) -> int:
        """Memory of all copies, in bytes."""
        return sum(copy.nbytes for copy in self._copies.values())

    def _copy(self, parameter: nn.Parameter, dtype: torch.dtype, refreshed: set[tuple[int, torch.Size, torch.dtype]]) -> nn.Parameter:
        key = (parameter.data_ptr(), parameter.shape, dtype)
        if key not in self._copies:
            self._copies[key] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        elif key not in refreshed:
            self._copies[key].data.copy_(parameter.detach())
        refreshed.add(key)
        return self._copies[key]


def casted_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The fp32 parameters that autocast casts for matrix products: those of linear layers that are neither quantized nor sharded."""
    return [
        (module, name, parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module.weight) is nn.Parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]


def uncached_casts(kind: str) -> AbstractContextManager[object]:
    """Autocast with its current settings for devices of type ``kind``, but without its cache of casts.

    Autocast would free that cache while a recorded CUDA graph still reads it.
    """
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)

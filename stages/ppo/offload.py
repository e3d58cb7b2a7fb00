"""Keep idle models in CPU memory while others use the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offload:
    """Moves modules between the compute device and CPU memory. Does nothing if ``enabled`` is False."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, *, enabled: bool, waiting: str = "cpu") -> None:
        self.modules, self.device, self.waiting = list(modules), device, torch.device(waiting)
        self.enabled = enabled
        if enabled:
            for module in self.modules:
                module.to(self.waiting)

    @contextmanager
    def awake(self, *modules: nn.Module | None) -> Iterator[None]:
        """Context in which ``modules`` are on the compute device. Parameters and gradients stay the same objects."""
        moved = [module for module in modules if module is not None and any(module is own for own in self.modules)] if self.enabled else []
        for module in moved:
            module.to(self.device)
        try:
            yield
        finally:
            for module in moved:
                module.to(self.waiting)

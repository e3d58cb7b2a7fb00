"""Python imports this module at its start: it loads the pretended GPU before torch, and adapts ``torch.cuda`` when torch is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _After:
    """A finder that calls ``before()`` before the import of some modules, and ``done(module)`` after it."""

    def __init__(self, hooks: dict[str, tuple[Callable[[], Any], Callable[[ModuleType], None]]]) -> None:
        self.hooks = hooks
        self._looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.hooks or self._looking:
            return None
        before, done = self.hooks[name]
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        own = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            before()
            try:
                own(module)
            finally:
                done(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _begin() -> None:
    device = ctypes.CDLL(os.environ["PRETEND_GPU"])  # before torch, which asks only once which devices there are

    def adapt(module: ModuleType) -> None:
        importlib.import_module("pretend_cuda").adapt(device)

    def hide() -> None:
        import torch

        torch.cuda.is_available = lambda: False

    def show(module: ModuleType) -> None:
        import torch

        torch.cuda.is_available = lambda: True

    # bitsandbytes would look for a library of CUDA kernels; without it its kernels in Python run on the device.
    sys.meta_path.insert(0, _After({"torch": (lambda: None, adapt), "bitsandbytes": (hide, show)}))  # type: ignore[arg-type]


if "PRETEND_GPU" in os.environ:
    _begin()

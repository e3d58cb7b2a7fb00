"""A recorder that works on a CPU like a CUDA graph: it runs the same operations on the same memory again, without Python.

An operation that makes new tensors writes them to those of the recording. An operation that reads numbers fails, as during a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.sampling.graphs import Recording


class Tape(TorchDispatchMode):
    """Records every operation that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nlong story")
        result = function(*arguments, **(options or {}))
        self.operations.append((function, arguments, options or {}, result))
        return result

    def replay(self) -> None:
        for function, arguments, options, result in self.operations:
            aliases = [returned.alias_info for returned in function._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view: its memory is not copied
            again = function(*arguments, **options)
            if any(alias is not None for alias in aliases):
                continue  # written in place
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class TapeRecorder:
    """Recordings have 1,000 bytes each. ``recorded``: how many steps were recorded."""

    def __init__(self, memory_limit: int = 1 << 40) -> None:
        self.memory_limit, self.recorded = memory_limit, 0

    def record(self, step: Callable[[], Tensor]) -> Recording:
        step()  # a run that initialises libraries
        tape = Tape()
        with tape:
            logits = step()
        self.recorded += 1
        return Recording(tape.replay, logits, 1000)

"""Means over tokens or examples of metrics that TRL's trainers compute per forward pass.

TRL takes the mean over passes, which depends on how a step is split. Here each pass counts by its number of tokens or examples.

TRL also reads every metric in every pass, and the CPU waits for the GPU each time. Here the metrics stay on the device until they are
logged or saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from stages.training.step_trainer import StepTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator

COUNT = "count/"  # prefix of the counts among a trainer's metrics


class WeightedMetrics(StepTrainer):
    """Mixin for a trainer of TRL. It calls ``count_pass`` in each pass. Without ``weighed_by`` the mixin changes nothing."""

    weighed_by: ClassVar[dict[str, str]] = {}
    """The count by which each metric is weighed: {"entropy": "tokens"}."""

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        """The loss of a pass, whose metrics are not read."""
        if not self.weighed_by:
            return super().compute_loss(*arguments, **named)
        with _unread_metrics(self.accelerator):
            return super().compute_loss(*arguments, **named)

    def count_pass(self, **counts: torch.Tensor | float) -> None:
        """Record the numbers of tokens or examples in a training pass. Call it once per pass.

        A tensor (a scalar on the GPU) is read when the metrics are logged or saved, so that the CPU does not wait for it in every pass.
        """
        for name, count in counts.items():
            self._metrics["train"][COUNT + name].append(count)  # type: ignore[arg-type]  # until ``read_counts``

    def read_counts(self) -> None:
        """Replace the tensors among the counts by numbers, in one transfer."""
        lists = getattr(self, "_metrics", {}).get("train", {})
        waiting = [(values, index) for values in lists.values() for index, value in enumerate(values) if isinstance(value, torch.Tensor)]
        if waiting:
            read = torch.stack([values[index].as_subclass(torch.Tensor).double() for values, index in waiting]).tolist()
            for (values, index), number in zip(waiting, read, strict=True):
                values[index] = number

    def log(self, logs: dict[str, float], *arguments: object, **named: object) -> None:
        """Log the means since the last call, with the metrics of ``weighed_by`` weighted by the counts of their passes."""
        self.read_counts()
        kept = self._metrics["train"] if self.weighed_by else {}
        counts = {name.removeprefix(COUNT): kept.pop(name) for name in list(kept) if name.startswith(COUNT)}
        for name, by in self.weighed_by.items():
            values, weights = kept.get(name, []), counts.get(by, [])
            # A pass in which nothing counts has the value 0 / 0.
            if sum(weights) and len(values) == len(weights):
                kept[name] = [sum(value * weight for value, weight in zip(values, weights, strict=True) if weight) / sum(weights)]
            elif values:
                kept[name] = [0.0 if math.isnan(value) else value for value in values]
        super().log(logs, *arguments, **named)  # type: ignore[arg-type]


# Metrics that stay on the device


class _Unread(torch.Tensor):
    """A number of a pass that TRL's code may use as if it had read it: ``item`` returns the tensor itself.

    TRL tests whether a count is greater than 0 before it divides. The answer here is yes without reading the count, because the mean over
    passes leaves out those without counted tokens. Every other use reads the number as usual.
    """

    def item(self) -> Any:
        return self

    def __gt__(self, other: Any) -> Any:
        return True if isinstance(other, int) and other == 0 else super().__gt__(other)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]  # a tensor's annotation
        return self + other  # a new tensor, because a pass that is repeated begins with the earlier sum


@contextmanager
def _unread_metrics(accelerator: Accelerator) -> Iterator[None]:
    """Context manager in which the numbers that TRL gathers for its metrics are not read."""
    usual = {name: getattr(accelerator, name) for name in ("gather", "gather_for_metrics")}
    own = {name: vars(accelerator).get(name) for name in usual}

    def unread(gather: Callable[..., Any]) -> Callable[..., Any]:
        def gathered(values: Any, *arguments: Any, **named: Any) -> Any:
            made = gather(values, *arguments, **named)
            return made.detach().as_subclass(_Unread) if isinstance(made, torch.Tensor) else made

        return gathered

    for name, gather in usual.items():
        setattr(accelerator, name, unread(gather))
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:
                delattr(accelerator, name)
            else:
                setattr(accelerator, name, before)

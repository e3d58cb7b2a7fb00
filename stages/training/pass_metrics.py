"""Means over tokens or examples of metrics that TRL's trainers compute per forward pass.

TRL takes the mean over passes, which depends on how a step is split. Here each pass counts by its number of tokens or examples.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from stages.training.step_trainer import StepTrainer

COUNT = "count/"  # prefix of the counts among a trainer's metrics


class WeightedMetrics(StepTrainer):
    """Mixin for a trainer of TRL. It calls ``count_pass`` in each pass. Without ``weighed_by`` the mixin changes nothing."""

    weighed_by: ClassVar[dict[str, str]] = {}
    """The count by which each metric is weighed: {"entropy": "tokens"}."""

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
            read = torch.stack([values[index].double() for values, index in waiting]).tolist()
            for (values, index), number in zip(waiting, read, strict=True):
                values[index] = number

    def log(self, logs: dict[str, float], *arguments: object, **named: object) -> None:
        self.read_counts()
        kept = self._metrics["train"] if self.weighed_by else {}
        counts = {name.removeprefix(COUNT): kept.pop(name) for name in list(kept) if name.startswith(COUNT)}
        for name, by in self.weighed_by.items():
            values, weights = kept.get(name, []), counts.get(by, [])
            if sum(weights) and len(values) == len(weights):
                kept[name] = [sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)]
        super().log(logs, *arguments, **named)  # type: ignore[arg-type]

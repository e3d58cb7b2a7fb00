"""Sums over the tokens of one minibatch, and the metrics computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed
from torch import Tensor

from stages import metric_names

SUMS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clipped",
    "value_clipped",
    "ratio",
    "ratio_squared",
    "error",
    "returns",
    "returns_squared",
    "values",
    "pretraining_loss",
)
"""The sums of every process, in the order in which they are reduced."""
LEAST_VARIANCE = 1e-8
"""The variance of equal returns, by which an error is divided."""


@dataclass
class Totals:
    """Sums over the tokens of one minibatch.

    They are accumulated on the tensors' device, in double precision, and read together, because each read makes the CPU wait for the GPU.
    """

    sums: dict[str, float] = field(default_factory=dict)
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _largest: Tensor | None = None

    def add(self, **values: Tensor | float) -> None:
        """Add scalars to the sums of these names. Tensors stay on their device until ``read``."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
                self._waiting[name] = self._waiting[name] + value if name in self._waiting else value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def note(self, deviation: Tensor) -> None:
        """Keep the maximum of the given scalars; NaN is ignored."""
        self._largest = deviation if self._largest is None else torch.fmax(self._largest, deviation)

    def reduce(self, device: torch.device) -> None:
        """Reduce SUMS and the maximum over all processes, without reading them. Call it on every process."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        # A process without an episode in this minibatch has no sums yet.
        sums = torch.stack([self._waiting.get(name, zero) for name in SUMS])
        distributed.all_reduce(sums)
        self._waiting.update(zip(SUMS, sums.unbind(), strict=True))
        largest = zero if self._largest is None else self._largest.double()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        self._largest = largest

    def read(self) -> float:
        """Copy the sums to the CPU; returns the maximum of the noted scalars (0 if there are none)."""
        names = list(self._waiting)
        waiting = [*self._waiting.values(), *([] if self._largest is None else [self._largest.double()])]
        numbers: list[float] = torch.stack(waiting).tolist() if waiting else []
        largest = numbers.pop() if self._largest is not None else 0.0
        for name, number in zip(names, numbers, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + number
        self._waiting, self._largest = {}, None
        return max(0.0, largest)


def policy_metrics(sums: dict[str, float], largest: float) -> dict[str, float]:
    """Means over the minibatch's tokens. ``largest``: the maximum of |ratio - 1|."""
    mean = {name: value / max(sums["tokens"], 1.0) for name, value in sums.items()}
    return {
        metric_names.POLICY_LOSS: mean["policy_loss"],
        metric_names.ENTROPY: mean["entropy"],
        metric_names.APPROX_KL: mean["approx_kl"],
        metric_names.CLIP_FRACTION: mean["clipped"],
        metric_names.RATIO_MEAN: mean["ratio"],
        metric_names.RATIO_VARIANCE: max(0.0, mean["ratio_squared"] - mean["ratio"] ** 2),
        metric_names.RATIO_MAX_DEVIATION: largest,
    }


def value_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the minibatch's states."""
    mean = {name: value / max(sums["states"], 1.0) for name, value in sums.items()}
    variance = mean["returns_squared"] - mean["returns"] ** 2
    return {
        metric_names.VALUE_LOSS: mean["value_loss"],
        metric_names.VALUE_CLIP_FRACTION: mean.get("value_clipped", 0.0),
        metric_names.VALUE_MEAN: mean["values"],
        metric_names.RETURNS_MEAN: mean["returns"],
        metric_names.RETURNS_VARIANCE: variance,
        # 1 - error / variance: 1 is perfect, 0 no better than the mean, below 0 worse.
        metric_names.EXPLAINED_VARIANCE: 1 - mean["error"] / max(variance, LEAST_VARIANCE),
    }


def means(minibatches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over minibatches. The explained variance is that of their summed errors and variances: that of a minibatch with almost equal
    returns is a large negative number.
    """
    made = {name: sum(one[name] for one in minibatches) / len(minibatches) for name in minibatches[0]}
    if metric_names.EXPLAINED_VARIANCE in made:
        variances = [max(one[metric_names.RETURNS_VARIANCE], LEAST_VARIANCE) for one in minibatches]
        explained = sum(one[metric_names.EXPLAINED_VARIANCE] * variance for one, variance in zip(minibatches, variances, strict=True))
        made[metric_names.EXPLAINED_VARIANCE] = explained / sum(variances)
    return made

"""The number of weights of a model, divided by what can be done with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelWeights:
    """Numbers of weights.

    ``linear``: of the linear modules that quantization and adapters apply to. ``output``: of the output layer, unless it is tied to the
    embedding. ``other``: all others (embeddings, norms, biases, experts that are one tensor). ``adapter``: of an adapter of rank 1 on every
    linear module of ``linear``.
    """

    linear: int
    other: int
    output: int
    adapter: int

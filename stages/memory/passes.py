"""A pass through a model, and its memory as a polynomial of rows and columns.

R rows (sequences), C columns (tokens of a row).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassKind:
    """A pass through the layers of a transformer, without an output layer.

    ``config``: the transformers config as JSON. ``weights`` and ``compute``: bytes per weight, and per value of the compute dtype.
    ``rank``: of the adapters that are trained; 0: all weights are trained. ``trains``: with a backward pass. ``masked``: rows have padding,
    so attention gets a mask.
    """

    config: str
    vocabulary: int
    device: str  # cpu | cuda
    weights: int
    compute: int
    trains: bool
    checkpointing: bool = False
    rank: int = 0
    quantization: str = "none"
    masked: bool = False


@dataclass(frozen=True)
class Polynomial:
    """Bytes as a function of layers, rows and columns: fixed + tokens * (R C) + pairs * (R C^2), each (of the model, of every layer)."""

    fixed: tuple[float, float]
    tokens: tuple[float, float]
    pairs: tuple[float, float]

    def at(self, layers: int, rows: float, columns: float) -> float:
        """The bytes of a pass; never negative."""
        sizes = (1.0, rows * columns, rows * columns**2)
        terms = zip((self.fixed, self.tokens, self.pairs), sizes, strict=True)
        return max(0.0, sum((of_model + layers * of_layer) * size for (of_model, of_layer), size in terms))


@dataclass(frozen=True)
class PassMemory:
    """The memory of a pass besides weights and gradients. ``kept``: at the end of the forward pass. ``peak``: the maximum."""

    kept: Polynomial
    peak: Polynomial

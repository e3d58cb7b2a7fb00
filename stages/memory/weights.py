"""The number of weights of a model and of an adapter, divided by what can be done with them."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK, GROUP = 64, 256
"""nf4: weights per scale, and scales per scale of scales with double quantization."""
SMALL = 4096
"""An 8-bit optimizer of bitsandbytes keeps the moments of a tensor with fewer weights in fp32."""


@dataclass(frozen=True)
class Quantizable:
    """The linear modules that bitsandbytes quantizes.

    ``rows``: their output features, summed. ``blocks`` and ``groups``: their scales in nf4, and the scales of these scales.
    """

    modules: int
    rows: int
    blocks: int
    groups: int

    @classmethod
    def of(cls, sizes: list[tuple[int, int]]) -> Quantizable:
        """``sizes``: (output features, input features) of each module."""
        blocks = [-(-rows * columns // BLOCK) for rows, columns in sizes]
        return cls(len(sizes), sum(rows for rows, _ in sizes), sum(blocks), sum(-(-each // GROUP) for each in blocks))


@dataclass(frozen=True)
class ModelWeights:
    """Numbers of weights.

    ``linear``: of the linear modules that bitsandbytes quantizes. ``output``: of the output layer, unless it is tied to the embedding; of a
    classifier, those of its head. ``other``: all others (embeddings, norms, biases, experts that are one tensor, towers for images and
    sounds).
    """

    linear: int
    other: int
    output: int
    quantizable: Quantizable


@dataclass(frozen=True)
class AdapterWeights:
    """Numbers of weights of an adapter.

    ``weights``: all that are trained. ``output``: those in full copies of the output layer, which a value network does not train.
    ``small``: those in tensors of fewer than SMALL weights. ``start``: further ones that are not trained, with which PiSSA and OLoRA start.
    ``unfit``: why the adapter cannot be added to the model; empty if it can.
    """

    weights: int
    output: int = 0
    small: int = 0
    start: int = 0
    unfit: str = ""

"""Speed of an iteration: tokens per second by phase, and the utilization of peak flops by the update's matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.kernels.matmul import measure_peak
from stages.metric_names import EPISODES_PER_SECOND, UPDATE_MATMUL_SHARE, seconds_name, tokens_per_second_name
from stages.models.responses import SequenceBatch

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


class MatmulCounter:
    """Flops of the matrix products in forward and backward passes. Elementwise operations are not counted.

    A product with a K x N weight costs 2 K N flops per token, and each of its two gradients as much. Attention costs 4 d per pair of a
    token and an earlier token.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._known: dict[int, tuple[float, float, int, int]] = {}

    def add(self, decoder: TransformersModel, batch: SequenceBatch, *, output: nn.Module | None = None, backward: bool = True) -> None:
        """Count a pass of ``decoder`` over a batch (``backward``: forward and backward), and of the output layer over its positions."""
        if id(decoder) not in self._known:
            self._known[id(decoder)] = _sizes(decoder)
        trained, frozen, layers, width = self._known[id(decoder)]
        rows, columns = batch.input_ids.shape
        lengths = batch.packing.lengths if batch.packing is not None else (columns,) * rows
        # A frozen weight has no weight gradient, but its input gradient is still computed.
        per_token = 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))
        attention = 4 * width * layers * (3 if backward else 1)  # per earlier token; a token has length / 2 of them on average
        self.flops += sum(length * (per_token + attention * length / 2) for length in lengths)
        if output is not None:
            trained, frozen = _weights(output)
            self.flops += len(batch.tokens) * 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))

    def take(self) -> float:
        """The flops counted since the last call."""
        taken, self.flops = self.flops, 0.0
        return taken


def _sizes(decoder: TransformersModel) -> tuple[float, float, int, int]:
    """(trained weights of linear layers, frozen weights of linear layers, layers, width) of a transformer."""
    config = decoder.config.get_text_config()
    trained = frozen = 0.0
    for module in decoder.modules():
        if not isinstance(module, nn.Embedding) and not any(True for _ in module.children()):
            own = _weights(module)
            trained, frozen = trained + own[0], frozen + own[1]
    return trained, frozen, int(config.num_hidden_layers), int(config.hidden_size)


def _weights(module: nn.Module) -> tuple[float, float]:
    """(trained, frozen) size of a layer's matrix. The stored shape of a quantized weight differs from its logical shape."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return 0.0, 0.0
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if inputs is not None and outputs is not None:
        size = float(inputs * outputs)
    elif weight.dim() == 2:
        size = float(weight.numel())
    else:
        return 0.0, 0.0
    return (size, 0.0) if weight.requires_grad else (0.0, size)


def speed_metrics(
    seconds: dict[str, float], *, episodes: int, response_tokens: int, trained_tokens: int, flops: float, peak: float
) -> dict[str, float]:
    """Metrics ``time/...`` of an iteration. Generation, scoring and measuring count response tokens per second; the update counts all
    trained tokens of all passes. ``peak``: flops per second of a large matrix product on this machine."""
    metrics = {seconds_name(name): value for name, value in seconds.items()}
    metrics[EPISODES_PER_SECOND] = episodes / max(sum(seconds.values()), 1e-9)
    for name, value in seconds.items():
        tokens = trained_tokens if name == "update" else response_tokens
        metrics[tokens_per_second_name(name)] = tokens / max(value, 1e-9)
    metrics[UPDATE_MATMUL_SHARE] = flops / max(seconds.get("update", 0.0), 1e-9) / peak
    return metrics


def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Peak flops per second of this machine's matrix products in ``dtype``; measured once, quickly."""
    return measure_peak(dtype, device)

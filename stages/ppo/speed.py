"""How fast an iteration was: tokens per second by phase, and the share of the machine's peak that the update's matrix products reached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stages.kernels.matmul import measure_peak
from stages.models.responses import SequenceBatch


class MatmulCounter:
    """Floating-point operations of the matrix products of forward and backward passes; what is elementwise does not count.

    A product with a weight of K x N costs 2 K N operations a token, its two gradients as much again each; attention costs 4 d for each
    token that a token looks back on.
    """

    def __init__(self) -> None:
        self.operations = 0.0
        self._known: dict[int, tuple[float, float, int, int]] = {}

    def add(self, decoder: nn.Module, batch: SequenceBatch, *, output: nn.Module | None = None, backward: bool = True) -> None:
        """Count a pass of ``decoder`` over a batch (``backward``: both ways), and of the output layer over its positions."""
        if id(decoder) not in self._known:
            self._known[id(decoder)] = _sizes(decoder)
        trained, frozen, layers, width = self._known[id(decoder)]
        rows, columns = batch.input_ids.shape
        lengths = batch.packing.lengths if batch.packing is not None else (columns,) * rows
        # A frozen weight has no gradient of its own; what lies below it still wants one.
        per_token = 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))
        attention = 4 * width * layers * (3 if backward else 1)  # for each token that a token looks back on, half of them at the mean
        self.operations += sum(length * (per_token + attention * length / 2) for length in lengths)
        if output is not None:
            trained, frozen = _weights(output)
            self.operations += len(batch.tokens) * 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))

    def take(self) -> float:
        """The operations counted since the last call."""
        taken, self.operations = self.operations, 0.0
        return taken


def _sizes(decoder: nn.Module) -> tuple[float, float, int, int]:
    """(weights of matrix products that train, that do not, layers, width) of a transformer."""
    config: Any = decoder.config
    config = config.get_text_config()
    trained = frozen = 0.0
    for module in decoder.modules():
        if not isinstance(module, nn.Embedding) and not any(True for _ in module.children()):
            own = _weights(module)
            trained, frozen = trained + own[0], frozen + own[1]
    return trained, frozen, int(config.num_hidden_layers), int(config.hidden_size)


def _weights(module: nn.Module) -> tuple[float, float]:
    """(trained, frozen) entries of a layer's matrix; a quantized one is stored as something else than it stands for."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return 0.0, 0.0
    has_shape = hasattr(module, "in_features") and hasattr(module, "out_features")
    if not has_shape and weight.dim() != 2:
        return 0.0, 0.0
    size = float(module.in_features * module.out_features) if has_shape else float(weight.numel())
    return (size, 0.0) if weight.requires_grad else (0.0, size)


def speed_metrics(
    seconds: dict[str, float], *, episodes: int, response_tokens: int, trained_tokens: int, operations: float, peak: float
) -> dict[str, float]:
    """Metrics ``time/...`` of an iteration. Tokens per second of generation, scoring and measuring are those of its responses; of the
    update all that it trained on, every pass. ``peak``: operations per second of a large product on this machine."""
    found = {f"time/{name}_s": value for name, value in seconds.items()}
    found["time/episodes_per_second"] = episodes / max(sum(seconds.values()), 1e-9)
    for name, value in seconds.items():
        tokens = trained_tokens if name == "update" else response_tokens
        found[f"time/{name}_tokens_per_second"] = tokens / max(value, 1e-9)
    found["time/update_matmul_share"] = operations / max(seconds.get("update", 0.0), 1e-9) / peak
    return found


def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that this machine's matrix products reach in ``dtype``; measured once, in a moment."""
    return measure_peak(dtype, device)

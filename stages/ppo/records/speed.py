"""Speed of an iteration: tokens per second by phase, and the utilization of peak flops by the update's matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from stages.metric_names import (
    EPISODES_PER_SECOND,
    UPDATE_MATMUL_SHARE,
    UPDATE_RECOMPUTED_SHARE,
    seconds_name,
    tokens_per_second_name,
)
from stages.models.passes.responses import SequenceBatch

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


class MatmulCounter:
    """Flops of the matrix products in forward and backward passes. Elementwise operations are not counted.

    A product with a K x N weight costs 2 K N flops per token, and each of its two gradients as much. Attention costs 4 d per pair of a
    token and an earlier token (d: width of all heads). Of the adapters on a backbone, only the active ones count. ``recomputed``: flops
    of the forward passes that gradient checkpointing repeats; they are not part of ``flops``.
    """

    def __init__(self) -> None:
        self.flops = self.recomputed = 0.0
        self._known: dict[tuple[int, tuple[str, ...]], tuple[float, float, int, bool]] = {}

    def add(self, decoder: TransformersModel, batch: SequenceBatch, *, output: nn.Module | None = None, backward: bool = True) -> None:
        """Count a pass of ``decoder`` over a batch (``backward``: forward and backward), and of the output layer over its positions."""
        key = id(decoder), _active_adapters(decoder)
        if key not in self._known:
            self._known[key] = _sizes(decoder)
        trained, frozen, width, recomputes = self._known[key]
        rows, columns = batch.input_ids.shape
        lengths = batch.packing.lengths if batch.packing is not None else (columns,) * rows
        # A frozen weight has no weight gradient, but its input gradient is still computed.
        per_token = 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))
        attention = 4 * width * (3 if backward else 1)  # per earlier token; a token has length / 2 of them on average
        self.flops += sum(length * (per_token + attention * length / 2) for length in lengths)
        if backward and recomputes:
            self.recomputed += sum(length * (2 * (trained + frozen) + 4 * width * length / 2) for length in lengths)
        if output is not None:
            trained, frozen = _weights(output)
            self.flops += len(batch.tokens) * 2 * (trained * (3 if backward else 1) + frozen * (2 if backward else 1))

    def take(self) -> tuple[float, float]:
        """``flops`` and ``recomputed`` since the last call."""
        taken = self.flops, self.recomputed
        self.flops = self.recomputed = 0.0
        return taken


def _sizes(decoder: TransformersModel) -> tuple[float, float, int, bool]:
    """(trained weights of linear layers, frozen weights of linear layers, width of all heads of all layers, whether it checkpoints)."""
    config = decoder.config.get_text_config()
    trained = frozen = 0.0
    for module in _computing(decoder):
        if not isinstance(module, nn.Embedding) and not any(True for _ in module.children()):
            own = _weights(module)
            trained, frozen = trained + own[0], frozen + own[1]
    width = 0
    # Layers may have heads of different widths (Gemma 4); then transformers refuses to read the width from the config itself.
    count = getattr(config, "num_hidden_layers", 0)  # BLT has none; its attention is not counted
    for layer in (getattr(config, "per_layer_config", None) or [config] * count) if count else ():
        heads, head_width = (getattr(layer, name, None) for name in ("num_attention_heads", "head_dim"))
        width += heads * head_width if isinstance(heads, int) and isinstance(head_width, int) else config.hidden_size
    recomputes = decoder.training and any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
    return trained, frozen, width, recomputes


def _active_adapters(decoder: nn.Module) -> tuple[str, ...]:
    """The adapters that a pass of ``decoder`` uses now; none without adapters."""
    adapted: Any = next((module for module in decoder.modules() if hasattr(module, "lora_A")), None)
    return () if adapted is None or adapted.disable_adapters else tuple(adapted.active_adapters)


def _computing(decoder: nn.Module) -> Iterator[nn.Module]:
    """The modules that a pass uses: without adapters of other roles, and without modules that a copy of the active adapter replaces."""
    active, idle = _active_adapters(decoder), set[nn.Module]()
    module: Any  # a layer of peft, if it has these attributes
    for module in decoder.modules():
        for part in ("lora_A", "lora_B"):
            idle.update(factor for name, factor in dict(getattr(module, part, {})).items() if name not in active)
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            used = next((copies[name] for name in active if name in copies), module.original_module)
            idle.update(one for one in (*copies.values(), module.original_module) if one is not used)
    idle = {inner for part in idle for inner in part.modules()}
    yield from (module for module in decoder.modules() if module not in idle)


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
    seconds: dict[str, float], *, episodes: int, response_tokens: int, trained_tokens: int, flops: tuple[float, float], peak: float
) -> dict[str, float]:
    """Metrics ``time/...`` of an iteration. Generation, scoring and measuring count response tokens per second; the update counts all
    trained tokens of all passes. ``flops``: of the update's products, and of those that checkpointing repeats. ``peak``: flops per second
    of a large matrix product on this machine."""
    metrics = {seconds_name(name): value for name, value in seconds.items()}
    metrics[EPISODES_PER_SECOND] = episodes / max(sum(seconds.values()), 1e-9)
    for name, value in seconds.items():
        tokens = trained_tokens if name == "update" else response_tokens
        metrics[tokens_per_second_name(name)] = tokens / max(value, 1e-9)
    counted, recomputed = (part / max(seconds.get("update", 0.0), 1e-9) / peak for part in flops)
    metrics[UPDATE_MATMUL_SHARE] = counted
    if recomputed:
        metrics[UPDATE_RECOMPUTED_SHARE] = recomputed
    return metrics

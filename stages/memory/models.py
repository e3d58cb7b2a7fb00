"""The models that a step reads, and the memory of a model in training or inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from stages.config import LoraSettings, TrainingStepConfig
from stages.kernels.token_budget import rows_per_batch
from stages.memory.estimate import (
    FP32,
    Machine,
    Memory,
    activations,
    dtype_bytes,
    frozen_weights,
    inference,
    lora_rank,
    phases,
    trained,
    unchunked_logits,
)
from stages.memory.shapes import Shape


class TrainingMemory(Protocol):
    """The settings of an optimizer that decide how much memory training takes."""

    @property
    def gradient_checkpointing(self) -> bool: ...


class TrainedStep(Protocol):
    """The fields of a step config that decide how much memory the activations take."""

    @property
    def lora(self) -> LoraSettings | None: ...
    @property
    def training(self) -> TrainingMemory: ...


EVALUATION_ROWS = 64  # sequences per scoring batch if the recipe does not set it


@dataclass(frozen=True)
class View:
    """A model that a step reads: its sizes and its loading options."""

    shape: Shape
    base: str  # identifies its full weights: roles with the same base can share them
    adapters: float = 0.0  # weights of its adapters
    quantization: str = "none"
    double: bool = True

    def frozen(self, compute: int, *, output: bool = True) -> Memory:
        """Memory of the model loaded without training."""
        merged = self.quantization == "none"  # adapters are merged into unquantized weights
        return Memory(
            weights=frozen_weights(self.shape, self.quantization, double=self.double, compute=compute, output=output),
            adapters=0.0 if merged else FP32 * self.adapters,
        )


def trained_model(config: TrainingStepConfig, view: View, machine: Machine, *, output: bool = True) -> Memory:
    """A model trained by a Trainer: full weights in fp32, or an adapter on frozen weights."""
    shape, rank = view.shape, lora_rank(config)
    if rank:
        adapter = shape.lora_weights(rank)
        below = view.frozen(dtype_bytes(config.precision, machine), output=output)
        return below + replace(trained(adapter, config.training.optimizer), adapters=FP32 * adapter)
    weights = shape.linear_weights + shape.other_weights + (shape.output_weights if output else 0)
    return Memory(weights=FP32 * weights) + trained(weights, config.training.optimizer)


def kept_activations(config: TrainedStep, shape: Shape, tokens: float, compute: int, machine: Machine) -> float:
    lora = bool(lora_rank(config))
    lean = machine.kind == "cpu" and compute == FP32 and not lora
    return activations(shape, tokens, compute, checkpointing=config.training.gradient_checkpointing, lora=lora, lean=lean)


def rows_per_pass(config: TrainingStepConfig, processes: int) -> int:
    share = max(1, config.training.batch_size // processes)
    return max(size for size in range(1, min(config.training.rows_per_pass, share) + 1) if share % size == 0)


def language_model(config: TrainingStepConfig, view: View, rows: int, columns: int, machine: Machine) -> Memory:
    """Next-token training with logits at every position."""
    compute = dtype_bytes(config.precision, machine)
    kept = kept_activations(config, view.shape, rows * columns, compute, machine)
    return trained_model(config, view, machine) + phases((0.0, kept, unchunked_logits(view.shape, rows * columns)))


def reading(shape: Shape, rows: int, prompt: int, compute: int, machine: Machine) -> float:
    """Activations of a prefill pass over as many of ``rows`` prompts as fit into one pass."""
    return inference(shape, rows_per_batch(rows, prompt, device_type=machine.kind) * prompt, compute)

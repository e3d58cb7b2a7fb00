"""The models that a step reads, and the memory of a model in training or inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from stages.config import CHECKED_WEIGHTS, LoraSettings, TrainingStepConfig
from stages.kernels.token_budget import CPU_TOKENS, PROMPT_TOKENS, rows_per_batch, token_budget_batches, tokens_of
from stages.memory.counting import has_plain_logits, pass_memory
from stages.memory.estimate import (
    FP32,
    Machine,
    Memory,
    activations,
    chunked_logits,
    dtype_bytes,
    frozen_weights,
    full_logits,
    inference,
    kv_cache,
    lora_rank,
    phases,
    tiled_logits,
    trained,
    unchunked_logits,
)
from stages.memory.passes import PassKind
from stages.memory.shapes import Shape

DRAWN_STEPS = 4  # number of steps that are drawn to find how full passes get


class TrainingMemory(Protocol):
    """The settings of an optimizer that decide how much memory training takes."""

    @property
    def gradient_checkpointing(self) -> bool: ...


class TrainedStep(Protocol):
    """The fields of a step config that decide how much memory the activations take."""

    @property
    def precision(self) -> str: ...
    @property
    def lora(self) -> LoraSettings | None: ...
    @property
    def training(self) -> TrainingMemory: ...


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


Phase = tuple[float, float, float]
"""Bytes of cache, activations and logits, as ``phases`` combines them."""


def training_phase(config: TrainedStep, view: View, rows: float, columns: int, machine: Machine, *, logits: float, masked: bool) -> Phase:
    """A forward and backward pass over ``rows`` sequences of ``columns`` tokens. ``logits``: bytes of the loss, which is between the two.

    The layers are counted on tensors without data (counting.py); constants replace a count that is impossible. ``masked``: the rows have
    padding that attention must hide.
    """
    shape, rank, compute = view.shape, lora_rank(config), dtype_bytes(config.precision, machine)
    checkpointing = config.training.gradient_checkpointing
    counted = pass_memory(
        PassKind(
            config=shape.config,
            vocabulary=shape.vocabulary,
            device=machine.kind,
            weights=compute if rank else FP32,
            compute=compute,
            trains=True,
            checkpointing=checkpointing,
            rank=rank,
            quantization=view.quantization if rank else "none",
            masked=masked,
        )
    )
    if counted is None:
        lean = machine.kind == "cpu" and compute == FP32 and not rank
        kept = activations(shape, rows * columns, compute, checkpointing=checkpointing, lora=bool(rank), lean=lean)
        return 0.0, kept, logits
    kept, peak = (part.at(shape.layers, rows, columns) for part in (counted.kept, counted.peak))
    return 0.0, peak, max(0.0, logits - (peak - kept))  # the backward pass of the layers begins when the logits are freed


def inference_bytes(shape: Shape, rows: float, columns: int, compute: int, machine: Machine) -> float:
    """The largest tensors of a pass without a backward pass over ``rows`` sequences of ``columns`` tokens."""
    kind = PassKind(shape.config, shape.vocabulary, machine.kind, weights=compute, compute=compute, trains=False)
    counted = pass_memory(kind)
    return inference(shape, rows * columns, compute) if counted is None else counted.peak.at(shape.layers, rows, columns)


def policy_logits(
    shape: Shape, tokens: float, positions: float, machine: Machine, *, trains_output: bool, compute: int, trains: bool = True
) -> float:
    """Bytes of the logits in a pass of a policy over ``tokens``, of which the loss (or the measurement) reads ``positions``."""
    if has_plain_logits(shape.config, shape.vocabulary):
        return chunked_logits(shape, positions, machine, trains_output=trains_output, compute=compute)
    if trains:
        return full_logits(shape, tokens, positions, compute=compute)
    return (2 * tokens * compute + 2 * positions * FP32) * shape.vocabulary


def saving(shape: Shape, *, output: bool = True) -> Phase:
    """The comparison of a small saved model with the model in memory: the saved one, in fp32, and the search for infinite weights in it.

    The search makes a copy in fp32 and three masks of one byte per weight. The embedding counts as the largest weight. ``output``: with the
    output layer.
    """
    weights = shape.weights - (0 if output else shape.output_weights)
    if weights > CHECKED_WEIGHTS:
        return 0.0, 0.0, 0.0
    return 0.0, FP32 * weights + (FP32 + 3) * shape.vocabulary * shape.hidden, 0.0


def cast_bytes(weights: float, compute: int) -> float:
    """Copies of fp32 weights in the compute dtype; 0 if that is fp32."""
    return weights * compute if compute < FP32 else 0.0


def rows_per_pass(
    config: TrainingStepConfig, processes: int, columns: int, machine: Machine, examples: Sequence[tuple[int, int]], *, texts: int = 1
) -> float:
    """The most examples of a Trainer's pass. An example has up to ``texts`` sequences of up to ``columns`` tokens.

    ``examples``: of some examples, the number of sequences and the tokens of the longest. From them follows how full a CPU's passes get;
    the result is then a fraction: tokens of the largest pass per longest example. Without them, passes use the token budget completely.
    """
    share = max(1, config.training.batch_size // processes)
    most = min(config.training.rows_per_pass, share)
    if processes > 1:
        return max(size for size in range(1, most + 1) if share % size == 0)
    if machine.kind != "cpu":
        return most
    longest = texts * columns
    if not examples:
        return min(most, max(1.0, CPU_TOKENS / longest))
    return largest_pass([number * min(tokens, columns) for number, tokens in examples], share, most) / longest


def largest_pass(examples: Sequence[int], batch_size: int, rows: int) -> int:
    """Tokens of the largest pass on a CPU. Steps of ``batch_size`` examples are drawn from ``examples`` (tokens of each)."""
    draw, largest = Random(0), 0
    for _ in range(DRAWN_STEPS):
        step = draw.sample(examples, batch_size) if len(examples) > batch_size else draw.choices(examples, k=batch_size)
        order = sorted(range(batch_size), key=lambda example: -step[example])
        groups = token_budget_batches(order, step, rows=rows, device_type="cpu")
        largest = max(largest, *(tokens_of(group, step) for group in groups))
    return largest


def language_model(config: TrainingStepConfig, view: View, rows: float, columns: int, machine: Machine, *, tiled: bool = False) -> Memory:
    """Next-token training with logits at every position. ``tiled``: by the loss of TRL, which makes the logits in tiles."""
    logits = unchunked_logits(view.shape, rows * columns)
    if tiled:
        compute = dtype_bytes(config.precision, machine)
        logits = tiled_logits(view.shape, rows * columns, machine, trains_output=not lora_rank(config), compute=compute)
    return trained_model(config, view, machine) + phases(
        training_phase(config, view, rows, columns, machine, logits=logits, masked=has_padding(config)),
        saving(view.shape),
    )


def has_padding(config: TrainingStepConfig) -> bool:
    """Whether the rows of a Trainer's step have different lengths, so that attention gets a mask."""
    return not (config.stage == "pretraining" or getattr(config, "packing", False))


def reading(shape: Shape, rows: int, prompt: int, compute: int, machine: Machine) -> float:
    """Activations, keys and values of a prefill pass over as many of ``rows`` prompts as fit into one pass."""
    most = min(rows, max(1, PROMPT_TOKENS // max(1, prompt)))
    read = rows_per_batch(most, prompt, device_type=machine.kind)
    return inference_bytes(shape, read, prompt, compute, machine) + kv_cache(shape, read, prompt, 0, compute)

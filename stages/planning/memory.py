"""What each step of a recipe will hold in memory at its fullest moment, by kind. Bytes, per process.

Counted, not guessed, where it can be: weights from the models' sizes, gradients and moments from what trains, activations from what a
layer keeps of a token. Lengths are upper ends: the longest prompt and as many new tokens as are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stages.planning.shapes import Shape

FP32, HALF = 4, 2
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
"""Of one weight: four bits, and a scale for each 64 of them (in 8 bits with double quantization)."""
CHUNK = {"cpu": 2 << 20, "cuda": 256 << 20}
"""As kernels/output_layer.py."""
HEAP = {"ppo": 2.2, "ppo with adapters": 2.6, "trainer": 1.4}
"""On a CPU activations need so many times their size: glibc keeps freed blocks of up to 32 MiB in its heap and splits them, the more the
more their sizes differ. Measured by tests/benchmarks/memory_plan.py; with every block given back at once a step needs what is counted, and
half as much time again."""
LORA_ACTIVATIONS = 1.35
"""What adapters keep beside their model's own activations, measured in the same way."""


@dataclass(frozen=True)
class Memory:
    """One step's fullest moment.

    ``kv_cache``, ``activations`` and ``logits`` come and go: each is the largest of all phases, ``passing`` what they are together in the
    phase that holds most, with what the allocator keeps of freed blocks.
    """

    weights: float = 0.0
    adapters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    kv_cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    passing: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.passing

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def as_json(self) -> dict[str, int]:
        return {**{field.name: round(getattr(self, field.name)) for field in fields(self)}, "total": round(self.total)}


def phases(*held: tuple[float, float, float]) -> Memory:
    """Phases that follow each other, each by its (cache, activations, logits)."""
    caches, kept, logits = zip(*held, strict=True)
    return Memory(kv_cache=max(caches), activations=max(kept), logits=max(logits), passing=max(map(sum, held)))


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. ``compute``: bytes of the dtype that precision: auto means there."""

    kind: str  # cpu | cuda
    bytes: int
    compute: int
    name: str


def dtype_bytes(precision: str, machine: Machine) -> int:
    """Bytes of a number that is computed in ``precision``."""
    return {"fp32": FP32, "bf16": HALF, "fp16": HALF}.get(precision, machine.compute)


def frozen_weights(shape: Shape, quantization: str, *, double: bool, compute: int, output: bool = True) -> float:
    """Of a model that does not train; quantization is of the layers' products, all else stays in the compute dtype."""
    each = {"none": float(compute), "int8": 1.0, "nf4": NF4_BYTES[double]}[quantization]
    return shape.linear_weights * each + (shape.other_weights + (shape.output_weights if output else 0)) * compute


def moments(weights: float, optimizer: str) -> float:
    """Adam's two moments: fp32, or 8 bits with a scale for each 256 weights (paged ones count where they are wanted: on the device)."""
    return weights * (2 * (1 + FP32 / 256) if optimizer.endswith("8bit") else 2 * FP32)


def trained(weights: float, optimizer: str) -> Memory:
    """Gradients and moments of weights that train in fp32."""
    return Memory(gradients=FP32 * weights, optimizer=moments(weights, optimizer))


def activations(shape: Shape, tokens: float, compute: int, *, checkpointing: bool = False, lora: bool = False, lean: bool = False) -> float:
    """What a forward pass over ``tokens`` keeps for its backward pass, and that pass's own largest tensors."""
    # In half precision a norm still keeps its input in fp32.
    layer = shape.saved_per_token(lean=lean) * compute + (2 * shape.hidden * FP32 if compute < FP32 else 0)
    each = layer * (LORA_ACTIVATIONS if lora else 1.0)
    kept = shape.layers * shape.hidden * compute + each if checkpointing else shape.layers * each
    passing = 3 * shape.intermediate * compute  # gradients of gate, up and their product, side by side
    return tokens * (kept + passing)


def inference(shape: Shape, tokens: float, compute: int) -> float:
    """The largest tensors of a forward pass that keeps nothing."""
    return tokens * (3 * shape.intermediate + 4 * shape.hidden) * compute


def kv_cache(shape: Shape, rows: int, prompt: int, new: int, compute: int) -> float:
    """Keys and values of a decoding batch; its room grows by doubling, with old and new side by side in one layer at a time."""
    return 2 * shape.layers * shape.kv_width * rows * (prompt + new) * compute


def chunked_logits(shape: Shape, positions: float, machine: Machine, *, trains_output: bool) -> float:
    """Losses at the output layer: a few chunks of logits, the hidden states' gradient, the layer's own."""
    chunk = min(4 * positions * shape.vocabulary, CHUNK[machine.kind])
    return 4 * chunk + positions * shape.hidden * FP32 * 2 + (shape.vocabulary * shape.hidden * FP32 if trains_output else 0)


def whole_logits(shape: Shape, positions: float) -> float:
    """Losses that hold logits, the shifted copy of them, its log-softmax and both gradients whole, in fp32."""
    return 5 * positions * shape.vocabulary * FP32


def lora_rank(config: Any) -> int:
    return config.lora.r if config.lora is not None else 0

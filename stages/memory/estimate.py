"""Peak memory of each step by kind, in bytes per process.

Where possible, values are computed: weights from model sizes, gradients and moments from trained weights, activations from what a layer
stores per token. Lengths are upper bounds: the longest prompt plus the maximum number of new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from stages.kernels.token_budget import CHUNK_BYTES, GPU_SHARE
from stages.memory.shapes import Shape

FP32, HALF = 4, 2
NF4_TABLE, SCALE_TABLE = 16 * FP32, 256 * FP32
"""bitsandbytes keeps with each nf4 weight the table of its 16 values, and on a GPU with double quantization that of its scales."""
TILE_TOKENS, TILE_COLUMNS = 4096, 32_768
"""Of the loss of TRL 1.16 (trl/kernels/chunked_logprob.py)."""
TILE_COPIES = 7.25
"""Copies of a tile in fp32 that its backward pass on a CPU makes at the same time; a quarter is a mask of one byte per logit."""
HEAP = {"ppo": 2.2, "ppo with adapters": 3.8, "trainer": 1.4, "trainer with adapters": 2.05}
"""On a CPU, activations take this multiple of their size: glibc keeps freed blocks of up to 32 MiB and fragments them, more so if their
sizes differ. Measured by tests/benchmarks/memory_plan.py. With immediate release of every block, a step needs the computed size but takes
1.5 times as long."""
LORA_ACTIVATIONS = 1.0
"""Activations with adapters, relative to those of the model. Used where layers cannot be counted; of two families, 0.92 and 1.02."""


@dataclass(frozen=True)
class Memory:
    """The peak memory of one step.

    ``kv_cache``, ``activations``, ``logits`` and ``awake`` (weights that are moved to the device for a phase) are temporary: each is its
    maximum over all phases. ``passing`` is their sum in the largest phase, plus freed blocks that the allocator keeps.
    """

    weights: float = 0.0
    adapters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    kv_cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    awake: float = 0.0
    passing: float = 0.0

    @property
    def held(self) -> float:
        """What stays for the complete step."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.held + self.passing

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def as_json(self) -> dict[str, int]:
        return {**{field.name: round(getattr(self, field.name)) for field in fields(self)}, "total": round(self.total)}


@dataclass(frozen=True)
class Phase:
    """Bytes that a step has temporarily: cache, activations, logits, and weights that are moved to the device for this phase.

    ``absent``: of what the step holds, bytes that do not exist at the peak of this phase (gradients, before the first backward pass).
    """

    cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    awake: float = 0.0
    absent: float = 0.0

    @property
    def total(self) -> float:
        return max(0.0, self.cache + self.activations + self.logits + self.awake - self.absent)


def phases(*held: Phase) -> Memory:
    """Combine consecutive phases."""
    return Memory(
        kv_cache=max(phase.cache for phase in held),
        activations=max(phase.activations for phase in held),
        logits=max(phase.logits for phase in held),
        awake=max(phase.awake for phase in held),
        passing=max(phase.total for phase in held),
    )


@dataclass(frozen=True)
class Machine:
    """The target machine. ``compute``: bytes per value of the dtype that precision: auto selects."""

    kind: str  # cpu | cuda
    bytes: int
    compute: int
    name: str


def fillable(machine: Machine) -> float:
    """Bytes of a GPU up to which passes grow with ``microbatch_size: auto``."""
    return GPU_SHARE * machine.bytes


def dtype_bytes(precision: str, machine: Machine) -> int:
    """Bytes per value in ``precision``."""
    return {"fp32": FP32, "bf16": HALF, "fp16": HALF}.get(precision, machine.compute)


def frozen_weights(shape: Shape, quantization: str, *, double: bool, compute: int, output: bool = True) -> float:
    """Weights of a frozen model. Only linear weights of the layers are quantized; the others have the compute dtype."""
    linear = compute * shape.linear_weights if quantization == "none" else quantized_weights(shape, quantization, double=double)
    return linear + (shape.other_weights + (shape.output_weights if output else 0)) * compute


def quantized_weights(shape: Shape, quantization: str, *, double: bool) -> float:
    """Linear weights in int8 (with a scale in fp32 per row) or nf4 (with a scale per 64 weights).

    nf4: a scale has 32 bits. With ``double`` quantization it has 8, and 256 scales have one in fp32; a module also has their offset.
    """
    modules = shape.quantizable
    if quantization == "int8":
        return shape.linear_weights + FP32 * modules.rows
    scales = modules.blocks + FP32 * (modules.groups + modules.modules) if double else FP32 * modules.blocks
    return shape.linear_weights / 2 + scales + NF4_TABLE * modules.modules


def moments(weights: float, optimizer: str, *, small: float = 0.0) -> float:
    """Adam's two moments: fp32, or 8 bits with a scale per 256 weights. Paged moments count as GPU memory.

    ``small``: those of ``weights`` in tensors that are too small for 8 bits (``memory/weights.py``).
    """
    if not optimizer.endswith("8bit"):
        return weights * 2 * FP32
    return (weights - small) * 2 * (1 + FP32 / 256) + small * 2 * FP32


def trained(weights: float, optimizer: str, *, small: float = 0.0) -> Memory:
    """Gradients and moments of weights trained in fp32. ``small``: as in ``moments``."""
    return Memory(gradients=FP32 * weights, optimizer=moments(weights, optimizer, small=small))


def activations(shape: Shape, tokens: float, compute: int, *, checkpointing: bool = False, lora: bool = False, lean: bool = False) -> float:
    """Activations that a forward pass over ``tokens`` stores for the backward pass, plus the largest tensors of the backward pass."""
    # In half precision, a norm stores its input in fp32.
    layer = shape.saved_per_token(lean=lean) * compute + (2 * shape.hidden * FP32 if compute < FP32 else 0)
    each = layer * (LORA_ACTIVATIONS if lora else 1.0)
    kept = shape.layers * shape.hidden * compute + each if checkpointing else shape.layers * each
    passing = 3 * shape.intermediate * compute  # gradients of gate, up and their product, at the same time
    return tokens * (kept + passing)


def inference(shape: Shape, tokens: float, compute: int) -> float:
    """The largest tensors of a forward pass that stores no activations."""
    return tokens * (3 * shape.intermediate + 4 * shape.hidden) * compute


def chunked_logits(shape: Shape, positions: float, machine: Machine, *, trains_output: bool, compute: int = FP32) -> float:
    """Losses with a chunked output layer: a few chunks of logits, the gradient of the hidden states, the gradient of the layer.

    In half precision, a trained layer has a cast.
    """
    chunk = min(4 * positions * shape.vocabulary, CHUNK_BYTES[machine.kind])
    output = shape.vocabulary * shape.hidden * (FP32 + (compute if compute < FP32 else 0)) if trains_output else 0
    return 4 * chunk + positions * shape.hidden * FP32 * 2 + output


def unchunked_logits(shape: Shape, positions: float) -> float:
    """Losses with unchunked logits: the logits, a shifted copy, their log-softmax and both gradients, in fp32."""
    return 5 * positions * shape.vocabulary * FP32


def full_logits(
    shape: Shape, tokens: float, positions: float, *, compute: int = FP32, capped: bool = True, with_entropy: bool = False
) -> float:
    """The loss of a policy that makes the logits of all ``tokens`` of a pass: its model changes them, or an adapter its output layer.

    ``positions``: those that the loss reads, in fp32. ``capped``: a cap keeps a copy of the logits. ``with_entropy``: with an entropy
    bonus. The result is the larger one of two peaks. At that of the loss there are four copies of the positions, with the bonus five. At
    that of the backward pass there are two copies of the gradient of the logits, and one of that of the positions.
    """
    kept = tokens * compute if capped else 0.0
    loss = (4 + with_entropy) * positions * FP32
    gradients = 2 * tokens * compute + positions * FP32
    return (kept + max(loss, gradients)) * shape.vocabulary


def tiled_logits(shape: Shape, positions: float, machine: Machine, *, trains_output: bool, compute: int = FP32) -> float:
    """The loss of TRL's SFT and DPO trainers: a tile of logits, the gradients of hidden states and output layer, and copies of the tile.

    A tile has up to TILE_TOKENS rows, and memory for TILE_COLUMNS logits in each. On a CPU only the logits of a smaller vocabulary take
    memory, because the rest is never written; but each step of the backward pass makes a copy in fp32. A GPU has a kernel without copies.
    """
    tokens, columns = min(positions, TILE_TOKENS), min(shape.vocabulary, TILE_COLUMNS)
    hidden = positions * shape.hidden * (compute + FP32)
    output = shape.vocabulary * shape.hidden * FP32 if trains_output else 0
    casts = columns * shape.hidden * compute if compute < FP32 else 0
    if machine.kind != "cpu":
        return tokens * TILE_COLUMNS * compute + hidden + output + casts
    return tokens * columns * (compute + TILE_COPIES * FP32) + hidden + output + casts


def with_heap(memory: Memory, machine: Machine, kind: str) -> Memory:
    """Add the freed blocks that the allocator keeps on a CPU. ``kind``: a key of HEAP."""
    if machine.kind != "cpu":
        return memory
    return replace(memory, passing=memory.passing + (HEAP[kind] - 1) * memory.activations)

"""The models that a step reads, and the memory of a model in training or inference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from stages.config import CHECKED_WEIGHTS, LoraSettings, TrainingStepConfig
from stages.kernels.token_budget import CPU_TOKENS, token_budget_batches, tokens_of
from stages.memory.counting import has_plain_logits, pass_memory
from stages.memory.decoding import cached, read_rows
from stages.memory.estimate import (
    FP32,
    Machine,
    Memory,
    Phase,
    activations,
    chunked_logits,
    dtype_bytes,
    frozen_weights,
    full_logits,
    inference,
    phases,
    tiled_logits,
    trained,
    unchunked_logits,
)
from stages.memory.passes import Adapter, PassKind, Task
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
    """A model that a step reads: its sizes and its loading options.

    ``adapters``: (identifier, weights) of each of its adapters. ``forms``: the same adapters, as in PassKind.stacks.
    ``generative``: it is a generative reward model. ``was_quantized``: one of its adapters was trained on quantized weights.
    """

    shape: Shape
    base: str  # identifies its full weights: roles with the same base can share them
    adapters: tuple[tuple[str, float], ...] = ()
    forms: tuple[str, ...] = ()
    quantization: str = "none"
    double: bool = True
    generative: bool = False
    was_quantized: bool = False

    @property
    def as_classifier(self) -> View:
        """The model loaded as a classifier."""
        return replace(self, shape=replace(self.shape, task="SEQ_CLS"))

    def frozen(self, compute: int, *, output: bool = True) -> Memory:
        """Memory of the model loaded without training."""
        merged = self.quantization == "none"  # adapters are merged into unquantized weights
        return Memory(
            weights=frozen_weights(self.shape, self.quantization, double=self.double, compute=compute, output=output),
            adapters=0.0 if merged else FP32 * sum(weights for _, weights in self.adapters),
        )


def loading(models: Collection[View], step: Memory, compute: int, machine: Machine) -> Phase:
    """The largest merge of adapters while the models of a step are loaded; it is in fp32. On a GPU, only dequantized weights are merged.

    ``step``: what the step needs. Its gradients and moments do not exist yet.
    """
    merged = [view for view in models if view.adapters and view.quantization == "none" and (machine.kind == "cpu" or view.was_quantized)]
    weights = max((view.shape.weights for view in merged), default=0)
    return Phase(awake=(FP32 - compute) * weights, absent=step.gradients + step.optimizer)


def new_adapter(view: View, lora: LoraSettings, optimizer: str, *, task: Task = "CAUSAL_LM", trains_output: bool = True) -> Memory:
    """A new adapter on ``view``, its gradients and moments. ``task``: the class that it is added to.

    ``trains_output``: whether full copies of the output layer get gradients. Raises ModelError if the adapter does not fit the model.
    """
    adapter = view.shape.adapter(_adapter_of(lora), task)
    weights = adapter.weights - (0 if trains_output else adapter.output)
    return replace(trained(weights, optimizer, small=adapter.small), adapters=FP32 * (adapter.weights + adapter.start))


def _adapter_of(lora: LoraSettings) -> Adapter:
    adapter = Adapter.of(lora)
    assert adapter is not None
    return adapter


def trained_model(config: TrainingStepConfig, view: View, machine: Machine, *, task: Task = "CAUSAL_LM") -> Memory:
    """A model trained by a Trainer: full weights in fp32, or an adapter on frozen weights. ``task``: the class that the step loads.

    A bare transformer has no output layer. Raises ModelError if the adapter does not fit the model.
    """
    shape, output, optimizer = view.shape, task != "FEATURE_EXTRACTION", config.training.optimizer
    if config.lora is not None:
        below = view.frozen(dtype_bytes(config.precision, machine), output=output)
        return below + new_adapter(view, config.lora, optimizer, task=task)
    weights = shape.linear_weights + shape.other_weights + (shape.output_weights if output else 0)
    return Memory(weights=FP32 * weights) + trained(weights, optimizer)


def training_phase(
    config: TrainedStep,
    view: View,
    rows: float,
    columns: int,
    machine: Machine,
    *,
    logits: float,
    masked: bool,
    task: Task = "CAUSAL_LM",
) -> Phase:
    """A forward and backward pass over ``rows`` sequences of ``columns`` tokens. ``logits``: bytes of the loss, which is between the two.

    The layers are counted on tensors without data (counting.py); constants replace a count that is impossible. ``masked``: the rows have
    padding that attention must hide. ``task``: the class that the step loads.
    """
    shape, compute = view.shape, dtype_bytes(config.precision, machine)
    adapter, checkpointing = Adapter.of(config.lora), config.training.gradient_checkpointing
    if adapter and shape.new_rows and logits:
        logits += compute * shape.vocabulary * shape.hidden  # the output layer with the trained rows; the layers below count the embedding
    counted = pass_memory(
        PassKind(
            config=shape.config,
            vocabulary=shape.vocabulary,
            device=machine.kind,
            weights=compute if adapter else FP32,
            compute=compute,
            trains=True,
            checkpointing=checkpointing,
            adapter=adapter,
            quantization=view.quantization if adapter else "none",
            masked=masked,
            task="CAUSAL_LM" if adapter is None or adapter.is_everywhere else task,
            new_rows=shape.new_rows if adapter else 0,
        )
    )
    if counted is None:
        lean = machine.kind == "cpu" and compute == FP32 and adapter is None
        kept = activations(shape, rows * columns, compute, checkpointing=checkpointing, lora=adapter is not None, lean=lean)
        return Phase(activations=kept, logits=logits)
    kept, peak = (part.at(shape.layers, rows, columns) for part in (counted.kept, counted.peak))
    # The backward pass of the layers begins when the logits are freed.
    return Phase(activations=peak, logits=max(0.0, logits - (peak - kept)))


def inference_phase(
    view: View, rows: float, columns: int, compute: int, machine: Machine, *, logits: float = 0.0, masked: bool = False
) -> Phase:
    """A pass without a backward pass over ``rows`` sequences of ``columns`` tokens. ``masked``: the rows have padding.

    ``logits``: bytes of what follows the layers, when their tensors are freed except for the last hidden states.
    """
    kind = PassKind(
        view.shape.config,
        view.shape.vocabulary,
        machine.kind,
        weights=compute,
        compute=compute,
        trains=False,
        quantization=view.quantization,
        masked=masked,
    )
    counted = pass_memory(kind)
    if counted is None:
        kept, peak = rows * columns * view.shape.hidden * compute, inference(view.shape, rows * columns, compute)
    else:
        kept, peak = (part.at(view.shape.layers, rows, columns) for part in (counted.kept, counted.peak))
    return Phase(activations=peak, logits=max(0.0, logits - (peak - kept)))


def decoding_phases(view: View, rows: int, prompt: int, new: int, machine: Machine, *, weights: int, compute: int) -> list[Phase]:
    """Reading ``rows`` prompts of ``prompt`` tokens, and the last step of ``new`` sampled tokens.

    ``weights``, ``compute``: bytes per weight, and per value of the compute dtype.
    """
    shape, tokens, device = view.shape, prompt + new, machine.kind
    memory = shape.decoding(device, weights, compute)
    read = read_rows(memory, rows, prompt, tokens, device)
    at_first, at_last = cached(memory, rows, prompt, new, device)
    # Passes that are divided have their own cache, whose content is then copied.
    apart = read * memory.kept(prompt, windows=False) if memory.reads_in_parts(tokens, device) else 0.0
    sampled = 3 * FP32 * rows * shape.vocabulary
    columns = tokens if memory.method == "text" else prompt
    logits = compute * shape.vocabulary * read * (1 if memory.limits_logits else columns)
    if memory.method == "text":
        return [inference_phase(view, read, columns, compute, machine, logits=logits + sampled)]
    reading = inference_phase(view, read, columns, compute, machine, logits=logits, masked=True)
    reading = replace(reading, cache=at_first, activations=reading.activations + apart)
    return [reading, Phase(at_last, rows * memory.of_step(tokens, device), sampled)]


def cache_bytes(view: View, rows: int, prompt: int, new: int, machine: Machine, *, weights: int, compute: int) -> float:
    """The slots that a GPU keeps between two calls of decoding; 0 if the model is decoded without slots."""
    memory = view.shape.decoding(machine.kind, weights, compute)
    return cached(memory, rows, prompt, new, machine.kind)[1] if memory.in_slots(prompt + new, machine.kind) else 0.0


def changes_output(view: View, lora: LoraSettings | None) -> bool:
    """Whether a new adapter changes the output layer of a language model: by a copy or a low-rank update."""
    return lora is not None and view.shape.adapter(_adapter_of(lora)).output > 0


def policy_logits(
    view: View,
    tokens: float,
    positions: float,
    machine: Machine,
    *,
    compute: int,
    lora: LoraSettings | None = None,
    trains: bool = False,
    with_entropy: bool = False,
) -> float:
    """Bytes of the logits in a pass of a policy over ``tokens``, of which the loss (or the measurement) reads ``positions``.

    They are made in chunks, unless the model changes them, or an adapter changes the output layer. ``lora``: the policy's new adapter.
    ``with_entropy``: the loss has an entropy bonus.
    """
    shape, adapted = view.shape, changes_output(view, lora)
    is_plain = has_plain_logits(shape.config, shape.vocabulary)
    if is_plain and not adapted:
        return chunked_logits(shape, positions, machine, trains_output=trains and lora is None, compute=compute)
    if trains:
        return full_logits(shape, tokens, positions, compute=compute, capped=not is_plain, with_entropy=with_entropy)
    return (2 * tokens * compute + 2 * positions * FP32) * shape.vocabulary


def saving(shape: Shape, *, output: bool = True) -> Phase:
    """The comparison of a small saved model with the model in memory: the saved one, in fp32, and the search for infinite weights in it.

    The search makes a copy in fp32 and three masks of one byte per weight. The embedding counts as the largest weight. ``output``: with the
    output layer.
    """
    weights = shape.weights - (0 if output else shape.output_weights)
    if weights > CHECKED_WEIGHTS:
        return Phase()
    return Phase(activations=FP32 * weights + (FP32 + 3) * shape.vocabulary * shape.hidden)


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


def language_model(
    config: TrainingStepConfig,
    view: View,
    rows: float,
    columns: int,
    machine: Machine,
    *,
    tiled: bool = False,
    masked: bool = False,
    full_step: bool = False,
) -> Memory:
    """Next-token training with logits at every position.

    ``tiled``: by the loss of TRL, which makes the logits in tiles. ``masked``: attention gets a mask. ``full_step``: see ``is_full_step``.
    """
    logits = unchunked_logits(view.shape, rows * columns)
    if tiled:
        compute = dtype_bytes(config.precision, machine)
        trains_output = config.lora is None or changes_output(view, config.lora)
        logits = tiled_logits(view.shape, rows * columns, machine, trains_output=trains_output, compute=compute)
    training = training_phase(config, view, rows, columns, machine, logits=logits, masked=masked)
    return trained_in_passes(trained_model(config, view, machine), training, saving(view.shape), full_step=full_step)


def trained_in_passes(model: Memory, training: Phase, saved: Phase, *, full_step: bool) -> Memory:
    """The memory of a trained ``model``, its passes and its saving. ``full_step``: see ``is_full_step``."""
    return model + phases(before_gradients(training, model) if full_step else training, saved)


def is_full_step(config: TrainingStepConfig, rows: float, processes: int) -> bool:
    """Whether one pass over ``rows`` examples computes a complete optimizer step. Then no gradients exist when its activations are largest:
    they are made while activations are freed."""
    return rows >= max(1, config.training.batch_size // processes)


def before_gradients(phase: Phase, trained: Memory) -> Phase:
    """``phase``, if the gradients of ``trained`` do not exist yet at its peak."""
    return replace(phase, absent=trained.gradients)


def keeps_masks(view: View) -> bool:
    """Whether right-padded rows keep their attention mask in SFT and DPO: the loss of routers must not count padding
    (``models/passes/right_padding.py``)."""
    return any(f'"{name}"' in view.shape.config for name in ("num_local_experts", "num_experts"))

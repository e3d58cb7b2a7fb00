"""Memory of each stage, from its settings and the sizes of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.kernels.passes import rows_of_a_pass
from stages.planning.lengths import Lengths
from stages.planning.memory import (
    FP32,
    HEAP,
    Machine,
    Memory,
    activations,
    chunked_logits,
    dtype_bytes,
    frozen_weights,
    inference,
    kv_cache,
    lora_rank,
    phases,
    trained,
    unchunked_logits,
)
from stages.planning.shapes import Shape

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


def memory_of(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory | None:
    """Estimate a step; None if the size of one of its models is unknown."""
    estimate = {
        "pretraining": _pretraining,
        "sft": _sft,
        "dpo": _dpo,
        "reward_model": _reward_model,
        "sentiment": _sentiment,
        "ppo": _ppo,
        "evaluation": _evaluation,
    }.get(config.stage)
    if estimate is None or any(view.shape.vocabulary == 0 for view in models.values()):
        return None
    memory = estimate(config, models, lengths, machine, processes)
    if machine.kind == "cpu":
        kind = "trainer"
        if config.stage == "ppo":
            kind = "ppo" if config.lora is None else "ppo with adapters"
        heap = HEAP[kind]
        memory = replace(memory, passing=memory.passing + (heap - 1) * memory.activations)
    return memory


# Stages on a Trainer


def _trained_model(config: Any, view: View, machine: Machine, *, output: bool = True) -> Memory:
    """A model trained by a Trainer: full weights in fp32, or an adapter on frozen weights."""
    shape, rank = view.shape, lora_rank(config)
    if rank:
        adapter = shape.lora_weights(rank)
        below = view.frozen(dtype_bytes(config.precision, machine), output=output)
        return below + replace(trained(adapter, config.training.optimizer), adapters=FP32 * adapter)
    weights = shape.linear_weights + shape.other_weights + (shape.output_weights if output else 0)
    return Memory(weights=FP32 * weights) + trained(weights, config.training.optimizer)


def _kept(config: Any, shape: Shape, tokens: float, compute: int, machine: Machine) -> float:
    lora = bool(lora_rank(config))
    lean = machine.kind == "cpu" and compute == FP32 and not lora
    return activations(shape, tokens, compute, checkpointing=config.training.gradient_checkpointing, lora=lora, lean=lean)


def _rows(config: Any, processes: int) -> int:
    share = max(1, config.training.batch_size // processes)
    return max(size for size in range(1, min(config.training.microbatch_size, share) + 1) if share % size == 0)


def _language_model(config: Any, view: View, rows: int, columns: int, machine: Machine) -> Memory:
    """Next-token training with logits at every position."""
    compute = dtype_bytes(config.precision, machine)
    kept = _kept(config, view.shape, rows * columns, compute, machine)
    return _trained_model(config, view, machine) + phases((0.0, kept, unchunked_logits(view.shape, rows * columns)))


def _pretraining(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    return _language_model(config, models["model"], _rows(config, processes), config.block_size, machine)


def _sft(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    longest = config.max_length or models["model"].shape.positions
    columns = longest if config.packing else min(longest, lengths.demonstration)
    return _language_model(config, models["model"], _rows(config, processes), columns, machine)


def _dpo(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """Both completions of a pair in one pass; plus a frozen reference unless an adapter is trained."""
    view, rows = models["model"], 2 * _rows(config, processes)
    columns = min(config.max_length or view.shape.positions, lengths.comparison)
    made = _language_model(config, view, rows, columns, machine)
    return made if lora_rank(config) else made + view.frozen(dtype_bytes(config.precision, machine))


def _reward_model(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    view, compute = models["model"], dtype_bytes(config.precision, machine)
    columns = min(config.max_length or view.shape.positions, lengths.comparison)
    tokens = _rows(config, processes) * lengths.completions * columns
    kept = _kept(config, view.shape, tokens, compute, machine)
    return _trained_model(config, view, machine, output=False) + phases((0.0, kept, 0.0))


def _sentiment(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    view, compute = models["model"], dtype_bytes(config.precision, machine)
    columns = min(config.max_length, lengths.text)
    tokens = _rows(config, processes) * columns
    kept = _kept(config, view.shape, tokens, compute, machine)
    step = _trained_model(config, view, machine, output=False) + phases((0.0, kept, 0.0))
    if config.masked is None:
        return step
    masked = config.model_copy(update={"training": config.masked.training, "lora": None})
    tokens = _rows(masked, processes) * columns
    guessing = (0.0, activations(view.shape, tokens, compute), unchunked_logits(view.shape, tokens))
    first = _trained_model(masked, view, machine) + phases(guessing)
    return max(step, first, key=lambda memory: memory.total)


# PPO


def _ppo(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    policy, compute = models["policy"], dtype_bytes(config.precision, machine)
    shape, new = policy.shape, config.generation.max_new_tokens
    prompt = min(config.max_prompt_tokens or shape.positions - new, lengths.prompt)
    value = _value_view(config, models)
    held = _ppo_adapted(config, models, value, compute) if config.lora is not None else _ppo_full(config, models, value, compute)

    share = max(1, config.rollout_batch_size // processes)
    decoding = min(config.generation.batch_size, share)
    rows = rows_of_a_pass(min(config.microbatch_size, config.minibatch_size), prompt + new, device_type=machine.kind)
    trains_output = config.lora is None
    sampling = (
        kv_cache(shape, decoding, prompt, new, compute),
        _reading(shape, decoding, prompt, compute, machine),
        3 * FP32 * decoding * shape.vocabulary,
    )
    bigger = shape if value is None or value.shape.hidden * value.shape.layers <= shape.hidden * shape.layers else value.shape
    updating = (
        0.0,
        _kept(config, bigger, rows * (prompt + new), compute, machine),
        chunked_logits(shape, rows * new, machine, trains_output=trains_output),
    )
    judges = [view for field_path, view in models.items() if field_path.startswith(("reward", "monitors"))]
    scored = min(EVALUATION_ROWS, share) * (prompt + new)
    scoring = [(0.0, inference(view.shape, scored, compute), 0.0) for view in judges]
    mixing = []
    if config.pretraining_mix is not None:
        block = config.pretraining_mix.block_size
        tokens = block * rows_of_a_pass(config.microbatch_size, block, device_type=machine.kind)
        kept = _kept(config, shape, tokens, compute, machine)
        mixing.append((0.0, kept, chunked_logits(shape, tokens, machine, trains_output=trains_output)))
    return held + phases(sampling, updating, *scoring, *mixing)


def _reading(shape: Shape, rows: int, prompt: int, compute: int, machine: Machine) -> float:
    """Activations of a prefill pass over as many of ``rows`` prompts as fit into one pass."""
    return inference(shape, rows_of_a_pass(rows, prompt, device_type=machine.kind) * prompt, compute)


def _value_view(config: Any, models: Mapping[str, View]) -> View | None:
    """The initial value network; None for a head on the policy's hidden states, and without a value network."""
    if config.value == "shared" or not config.has_value:
        return None
    if "value" in models:
        return models["value"]
    if config.value is None:
        for field_path, view in models.items():
            if field_path.startswith("reward") and view.shape.vocabulary == models["policy"].shape.vocabulary and not view.shape.encoder:
                return view
    return models["policy"]


def _ppo_full(config: Any, models: Mapping[str, View], value: View | None, compute: int) -> Memory:
    """Full fine-tuning: every role has its own weights."""
    policy, optimizer = models["policy"], config.training.optimizer
    held = Memory(weights=FP32 * policy.shape.weights) + trained(policy.shape.weights, optimizer)
    if value is not None:
        weights = value.shape.linear_weights + value.shape.other_weights
        held += Memory(weights=FP32 * weights) + trained(weights, optimizer)
    if config.ema_decay is not None:
        held += Memory(weights=FP32 * policy.shape.weights)
    waiting = [models.get("reference", policy).frozen(compute), *_judges(models, compute)]
    return held if config.offload else _summed(held, waiting)


def _ppo_adapted(config: Any, models: Mapping[str, View], value: View | None, compute: int) -> Memory:
    """LoRA: roles on the same base share it, and each has its own adapters."""
    policy, rank, optimizer = models["policy"], lora_rank(config), config.training.optimizer
    adapter = policy.shape.lora_weights(rank)
    held = policy.frozen(compute) + replace(trained(adapter, optimizer), adapters=FP32 * (adapter + policy.adapters))

    def shares(view: View) -> bool:
        return (view.base, view.quantization, view.double) == (policy.base, policy.quantization, policy.double)

    if value is not None:
        adapter = value.shape.lora_weights(rank)
        held += replace(trained(adapter, optimizer), adapters=FP32 * adapter)
        if not shares(value):
            held += value.frozen(compute, output=False)
    if config.ema_decay is not None:
        held += Memory(adapters=FP32 * policy.shape.lora_weights(rank))
    others = [view for field_path, view in models.items() if field_path == "reference" or field_path.startswith(("reward", "monitors"))]
    waiting = [Memory(adapters=FP32 * view.adapters) if shares(view) else view.frozen(compute, output=False) for view in others]
    return _summed(held, [part for part in waiting if not config.offload or part.weights == 0])


def _judges(models: Mapping[str, View], compute: int) -> list[Memory]:
    return [view.frozen(compute, output=False) for field_path, view in models.items() if field_path.startswith(("reward", "monitors"))]


def _summed(first: Memory, more: list[Memory]) -> Memory:
    for part in more:
        first += part
    return first


# Evaluation


def _evaluation(config: Any, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """One candidate, then one judge at a time."""
    compute, new = dtype_bytes(config.precision, machine), config.generation.max_new_tokens
    candidates = []
    for field_path, view in models.items():
        if field_path.startswith("judges") or view.shape.encoder:
            tokens = EVALUATION_ROWS * (lengths.prompt + new)
            candidates.append(view.frozen(compute, output=False) + phases((0.0, inference(view.shape, tokens, compute), 0.0)))
            continue
        rows = config.generation.batch_size
        reading = _reading(view.shape, rows, lengths.prompt, compute, machine)
        cache = kv_cache(view.shape, rows, lengths.prompt, new, compute)
        candidates.append(view.frozen(compute) + phases((cache, reading, 3 * FP32 * rows * view.shape.vocabulary)))
    return max(candidates, key=lambda memory: memory.total, default=Memory())

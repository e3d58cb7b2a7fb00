"""Estimate of the peak memory of a PPO step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stages.config import SCORING_ROWS
from stages.kernels.token_budget import GPU_TOKENS, KEPT_SHARE, rows_per_batch
from stages.memory.estimate import (
    FP32,
    Machine,
    Memory,
    dtype_bytes,
    fillable,
    kv_cache,
    lora_rank,
    phases,
    trained,
)
from stages.memory.lengths import Counter, Lengths, prompt_texts
from stages.memory.models import Phase, View, cast_bytes, inference_bytes, largest_pass, policy_logits, reading, saving, training_phase
from stages.ppo.config import PPOStepConfig


def lengths_of(config: PPOStepConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    texts = prompt_texts(config.data, config.prompt_words, split="train")
    return Lengths(prompt=counter.longest(texts), examples=counter.examples(texts))


def estimate(config: PPOStepConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    policy, compute = models["policy"], dtype_bytes(config.precision, machine)
    shape, new = policy.shape, config.generation.max_new_tokens
    prompt = min(config.max_prompt_tokens or shape.positions - new, lengths.prompt)
    value = _value_view(config, models)
    held_by = _held_by_full_training if config.lora is None else _held_by_adapters
    held = held_by(config, models, value, compute)

    decoding = min(config.generation.batch_size, max(1, config.rollout_batch_size // processes))
    trains_output = config.lora is None
    cache = kv_cache(shape, decoding, prompt, new, compute, machine.kind)
    copies = cast_bytes(shape.linear_weights + shape.vocabulary * shape.hidden, compute) if config.lora is None else 0.0
    sampling = (cache + copies, reading(shape, decoding, prompt, compute, machine), 3 * FP32 * decoding * shape.vocabulary)
    # A GPU keeps the cache and the recorded steps for the next iteration, if they are small enough.
    records = machine.kind == "cuda" and config.generation.cuda_graphs and policy.quantization != "int8"
    kept = cache + copies if records and cache + copies <= KEPT_SHARE * machine.bytes else 0.0
    bigger = policy if value is None or value.shape.hidden * value.shape.layers <= shape.hidden * shape.layers else value
    # The casts of both networks stay for all passes of an optimizer step; the plan of a pass counts those of its network.
    other = 0.0 if value is None or config.lora is not None else cast_bytes(min(shape.linear_weights, value.shape.linear_weights), compute)

    def trained_on(view: View, rows: float, columns: int, positions: float) -> Phase:
        logits = policy_logits(shape, rows * columns, positions, machine, trains_output=trains_output, compute=compute)
        _, layers, loss = training_phase(config, view, rows, columns, machine, logits=logits, masked=False)
        return kept, layers + other, loss

    def update(rows: float) -> Phase:
        return trained_on(bigger, rows, prompt + new, rows * new)

    share = -(-config.minibatch_size // processes)
    episodes = [min(tokens, prompt) + new for _, tokens in lengths.examples] or [prompt + new]
    updating = update(_update_rows(config, episodes, prompt + new, machine, share, lambda rows: held.total + sum(update(rows))))
    own = max(1, config.rollout_batch_size // processes)
    judges = [view for field_path, view in models.items() if field_path.startswith(("reward", "monitors"))]
    scored = min(SCORING_ROWS, own)
    scoring = [(kept, inference_bytes(view.shape, scored, prompt + new, compute, machine), 0.0) for view in judges]
    measured = _measured_rows(config, prompt + new, machine, own)
    casts = other + (cast_bytes(shape.linear_weights, compute) if config.lora is None else 0.0)
    read = inference_bytes(bigger.shape, measured, prompt + new, compute, machine)
    read_logits = policy_logits(
        shape, measured * (prompt + new), measured * new, machine, trains_output=False, compute=compute, trains=False
    )
    measuring = (kept, read + casts, read_logits)
    mixing = []
    if config.pretraining_mix is not None:
        block = config.pretraining_mix.block_size
        rows = rows_per_batch(config.rows_per_pass, block, device_type=machine.kind)
        mixing.append(trained_on(policy, rows, block, rows * block))
    return held + phases(sampling, updating, measuring, *scoring, *mixing, saving(shape))


def _measured_rows(config: PPOStepConfig, length: int, machine: Machine, own: int) -> int:
    """Maximum number of episodes in a pass without gradients. This process has ``own`` episodes of ``length`` tokens."""
    if config.microbatch_size == "auto" and machine.kind == "cuda":
        return min(own, max(1, GPU_TOKENS // length))
    return rows_per_batch(min(own, config.measuring_rows), length, device_type=machine.kind)


def _update_rows(
    config: PPOStepConfig, episodes: Sequence[int], length: int, machine: Machine, share: int, needed: Callable[[int], float]
) -> float:
    """The number of episodes of ``length`` tokens in one pass of the update. On a CPU it is a fraction, because passes fill up with tokens.

    ``episodes``: the tokens of some episodes. ``share``: episodes of a minibatch on one process. ``needed(rows)``: memory in bytes with
    ``rows`` episodes per pass. With ``auto`` on a GPU, the number is as large as the memory allows, and at least one.
    """
    if machine.kind == "cpu":
        return largest_pass(episodes, share, config.rows_per_pass) / length
    if config.microbatch_size != "auto":
        return min(config.rows_per_pass, share)
    rows = max(1, min(share, GPU_TOKENS // length))
    while rows > 1 and needed(rows) > fillable(machine):
        rows -= 1
    return rows


def heap(config: PPOStepConfig) -> str:
    """The key of HEAP for this step."""
    return "ppo" if config.lora is None else "ppo with adapters"


def _value_view(config: PPOStepConfig, models: Mapping[str, View]) -> View | None:
    """The initial value network; None for a head on the policy's hidden states, and without a value network."""

    def fits(name: str) -> bool:
        """Without tokenizers, models with equally many tokens count as having the same vocabulary."""
        return models[name].shape.vocabulary == models["policy"].shape.vocabulary and not models[name].shape.encoder

    start = config.value_input(fits)
    return None if start is None else models[start]


def _held_by_full_training(config: PPOStepConfig, models: Mapping[str, View], value: View | None, compute: int) -> Memory:
    """Full fine-tuning: every role has its own weights."""
    policy, optimizer = models["policy"], config.training.optimizer
    held = Memory(weights=FP32 * policy.shape.weights) + trained(policy.shape.weights, optimizer)
    if value is not None:
        weights = value.shape.linear_weights + value.shape.other_weights
        held += Memory(weights=FP32 * weights) + trained(weights, optimizer)
    if config.ema.decay is not None:
        held += Memory(weights=FP32 * policy.shape.weights)
    waiting = [models.get("reference", policy).frozen(compute), *_frozen_rewards(models, compute)]
    return held if config.offload else _summed(held, waiting)


def _held_by_adapters(config: PPOStepConfig, models: Mapping[str, View], value: View | None, compute: int) -> Memory:
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
    if config.ema.decay is not None:
        held += Memory(adapters=FP32 * policy.shape.lora_weights(rank))
    others = [view for field_path, view in models.items() if field_path == "reference" or field_path.startswith(("reward", "monitors"))]
    waiting = [Memory(adapters=FP32 * view.adapters) if shares(view) else view.frozen(compute, output=False) for view in others]
    return _summed(held, [part for part in waiting if not config.offload or part.weights == 0])


def _frozen_rewards(models: Mapping[str, View], compute: int) -> list[Memory]:
    return [view.frozen(compute, output=False) for field_path, view in models.items() if field_path.startswith(("reward", "monitors"))]


def _summed(first: Memory, more: list[Memory]) -> Memory:
    for part in more:
        first += part
    return first

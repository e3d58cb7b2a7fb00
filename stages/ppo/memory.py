"""Estimate of the peak memory of a PPO step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stages.kernels.token_budget import GPU_TOKENS, KEPT_SHARE, rows_per_batch
from stages.memory.estimate import FP32, Machine, Memory, Phase, dtype_bytes, fillable, phases, trained
from stages.memory.lengths import Counter, Lengths, prompt_texts
from stages.memory.models import (
    View,
    before_gradients,
    cache_bytes,
    cast_bytes,
    decoding_phases,
    inference_phase,
    largest_pass,
    new_adapter,
    policy_logits,
    saving,
    training_phase,
)
from stages.memory.passes import Adapter, planned_form
from stages.ppo.config import PPOStepConfig
from stages.rewards.memory import Judge, frozen_judge, is_reward_model, judges_of, scoring_phase


def lengths_of(config: PPOStepConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    texts = prompt_texts(config.data, config.prompt_words, split="train")
    return Lengths(prompt=counter.longest(texts), examples=counter.examples(texts))


def estimate(config: PPOStepConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process. Raises ModelError if an adapter does not fit its model."""
    policy, compute = models["policy"], dtype_bytes(config.precision, machine)
    shape, new = policy.shape, config.generation.max_new_tokens
    prompt = min(config.max_prompt_tokens or shape.positions - new, lengths.prompt)
    step = _Step(config, policy, _value_view(config, models), prompt, machine, processes, compute)
    judges = [*judges_of(config.reward, "reward", models), *judges_of(config.monitors, "monitors", models)]
    held_by = _held_by_full_training if config.lora is None else _held_by_adapters
    held, waiting = held_by(config, models, step.value, judges, compute)
    if not config.offload:
        held = _summed(held, [waiting.reference, *waiting.judges])
    # With offload, a model that waits is moved to the device when it is needed.
    reference, scorers = (waiting.reference.held, sum(one.held for one in waiting.judges)) if config.offload else (0.0, 0.0)
    copies = cast_bytes(shape.linear_weights + shape.vocabulary * shape.hidden, compute) if config.lora is None else 0.0
    sampling, kept = _sampling(config, policy, prompt, machine, processes, compute, copies)
    scoring = [replace(scoring_phase(judge, step.episodes, prompt, new, compute, machine), cache=kept, awake=scorers) for judge in judges]
    updating = step.updating(held, lengths, kept)
    return held + phases(*sampling, updating, step.measuring(kept, reference), *scoring, *step.mixing(kept), saving(shape))


@dataclass(frozen=True)
class _Step:
    """A PPO step on one process: its models, and the sizes of its passes. ``kept``: bytes that sampling keeps during the other phases."""

    config: PPOStepConfig
    policy: View
    value: View | None
    prompt: int  # tokens of the longest prompt
    machine: Machine
    processes: int
    compute: int  # bytes of a value of the compute dtype

    @property
    def new(self) -> int:
        """Tokens of the longest response."""
        return self.config.generation.max_new_tokens

    @property
    def episodes(self) -> int:
        """Episodes of a rollout on this process."""
        return max(1, self.config.rollout_batch_size // self.processes)

    @property
    def bigger(self) -> View:
        """The larger one of policy and value network."""
        shape, value = self.policy.shape, self.value
        return self.policy if value is None or value.shape.hidden * value.shape.layers <= shape.hidden * shape.layers else value

    @property
    def other_casts(self) -> float:
        """The casts of both networks stay for all passes of an optimizer step; the plan of a pass counts those of its network."""
        if self.value is None or self.config.lora is not None:
            return 0.0
        return cast_bytes(min(self.policy.shape.linear_weights, self.value.shape.linear_weights), self.compute)

    def updating(self, held: Memory, lengths: Lengths, kept: float) -> Phase:
        """The largest pass of the update."""
        config, total = self.config, self.prompt + self.new

        def update(rows: float) -> Phase:
            return self._trained(self.bigger, rows, total, rows * self.new, kept)

        share = -(-config.minibatch_size // self.processes)
        examples = [min(tokens, self.prompt) + self.new for _, tokens in lengths.examples] or [total]
        rows = _update_rows(config, examples, total, self.machine, share, lambda rows: held.total + update(rows).total)
        if rows < share or config.lora is not None:
            return update(rows)
        # One pass of each network computes the step. The gradients of the network whose pass is second do not exist yet at its peak.
        weights = self.bigger.shape.weights if self.value is None else min(self.policy.shape.weights, self.value.shape.weights)
        return before_gradients(update(rows), trained(weights, config.training.optimizer))

    def measuring(self, kept: float, reference: float) -> Phase:
        """The largest pass that measures a rollout. ``reference``: bytes of a reference that is moved to the device for it."""
        config, shape, total = self.config, self.policy.shape, self.prompt + self.new
        rows = _measured_rows(config, total, self.machine, self.episodes)
        casts = self.other_casts + (cast_bytes(shape.linear_weights, self.compute) if config.lora is None else 0.0)
        logits = policy_logits(self.policy, rows * total, rows * self.new, self.machine, compute=self.compute, lora=config.lora)
        read = inference_phase(self.bigger, rows, total, self.compute, self.machine, logits=logits)
        return replace(read, cache=kept, activations=read.activations + casts, awake=reference)

    def mixing(self, kept: float) -> list[Phase]:
        """The largest pass over the pretraining mix; empty without a mix."""
        if self.config.pretraining_mix is None:
            return []
        block = self.config.pretraining_mix.block_size
        rows = rows_per_batch(self.config.rows_per_pass, block, device_type=self.machine.kind)
        return [self._trained(self.policy, rows, block, rows * block, kept)]

    def _trained(self, view: View, rows: float, columns: int, positions: float, kept: float) -> Phase:
        """A training pass of ``view`` over ``rows`` sequences of ``columns`` tokens, with a loss at ``positions``."""
        config = self.config
        options = {"trains": True, "with_entropy": config.entropy_coef > 0}
        logits = policy_logits(self.policy, rows * columns, positions, self.machine, compute=self.compute, lora=config.lora, **options)
        passed = training_phase(config, view, rows, columns, self.machine, logits=logits, masked=False)
        return replace(passed, cache=kept, activations=passed.activations + self.other_casts)


def _sampling(
    config: PPOStepConfig, policy: View, prompt: int, machine: Machine, processes: int, compute: int, copies: float
) -> tuple[list[Phase], float]:
    """(the phases of sampling, what a GPU keeps of them for the next iteration). vLLM samples in another process.

    ``copies``: bytes of the weights' casts, which decoding has with the cache.
    """
    generation = config.generation
    if generation.vllm is not None:
        return [], 0.0
    rows = min(generation.batch_size, max(1, config.rollout_batch_size // processes))
    weights = FP32 if config.lora is None else compute
    decoded = decoding_phases(policy, rows, prompt, generation.max_new_tokens, machine, weights=weights, compute=compute)
    sampling = [replace(phase, cache=phase.cache + copies) for phase in decoded]
    # A GPU keeps the cache and the recorded steps for the next iteration, if they are small enough.
    if machine.kind != "cuda" or not generation.cuda_graphs or policy.quantization == "int8":
        return sampling, 0.0
    slots = cache_bytes(policy, rows, prompt, generation.max_new_tokens, machine, weights=weights, compute=compute)
    return sampling, slots + copies if slots and slots + copies <= KEPT_SHARE * machine.bytes else 0.0


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
        view = models[name]
        return view.shape.vocabulary == models["policy"].shape.vocabulary and not view.shape.encoder and not view.generative

    start = config.value_input(fits)
    return None if start is None else models[start]


@dataclass(frozen=True)
class _Waiting:
    """Models with their own weights that are idle most of the time: the reference, and the models of rewards and monitors."""

    reference: Memory
    judges: list[Memory]


def _held_by_full_training(
    config: PPOStepConfig, models: Mapping[str, View], value: View | None, judges: list[Judge], compute: int
) -> tuple[Memory, _Waiting]:
    """Full fine-tuning: every role has its own weights."""
    policy, optimizer = models["policy"], config.training.optimizer
    held = Memory(weights=FP32 * policy.shape.weights) + trained(policy.shape.weights, optimizer)
    if value is not None:
        weights = value.shape.linear_weights + value.shape.other_weights
        held += Memory(weights=FP32 * weights) + trained(weights, optimizer)
    if config.ema.decay is not None:
        held += Memory(weights=FP32 * policy.shape.weights)
    reference = models.get("reference", policy).frozen(compute)
    return held, _Waiting(reference, [frozen_judge(judge, compute) for judge in judges])


def _held_by_adapters(
    config: PPOStepConfig, models: Mapping[str, View], value: View | None, judges: list[Judge], compute: int
) -> tuple[Memory, _Waiting]:
    """LoRA: roles on the same base share it, and each has its own adapters. Classifiers and language models that judge do not share it."""
    assert config.lora is not None
    policy, optimizer = models["policy"], config.training.optimizer
    added = new_adapter(policy, config.lora, optimizer)
    held = replace(policy, adapters=()).frozen(compute) + added
    frozen_adapters = dict(policy.adapters)  # below; roles that have one in common load it once

    def shares(view: View) -> bool:
        return _share(view, policy)

    if value is not None and shares(value):
        frozen_adapters |= dict(value.adapters)
        held += new_adapter(value, config.lora, optimizer, trains_output=False)
    elif value is not None:
        held += value.frozen(compute, output=False) + new_adapter(value, config.lora, optimizer, task="FEATURE_EXTRACTION")
    if config.ema.decay is not None:
        held += Memory(adapters=added.gradients)  # as many weights as are trained
    reference, own = Memory(), []
    if (frozen := models.get("reference")) is not None:
        if shares(frozen):
            frozen_adapters |= dict(frozen.adapters)
        else:
            reference = frozen.frozen(compute)
    for judge in judges:
        if is_reward_model(judge) and shares(judge[1]):
            frozen_adapters |= dict(judge[1].adapters)
        else:
            own.append(frozen_judge(judge, compute))
    return held + Memory(adapters=FP32 * sum(frozen_adapters.values())), _Waiting(reference, own)


def stacks(config: PPOStepConfig, models: Mapping[str, View], adapter: Adapter) -> tuple[tuple[str, ...], ...]:
    """The unmerged adapters of each role on the policy's base, as PassKind.stacks has them, in the order in which the step adds them."""
    policy, value = models["policy"], _value_view(config, models)
    roles = [(*policy.forms, planned_form("policy", adapter))]
    if value is not None and _share(value, policy):
        roles.append((*value.forms, planned_form("value", adapter)))
    judges = [*judges_of(config.reward, "reward", models), *judges_of(config.monitors, "monitors", models)]
    frozen = [view for judge in judges if is_reward_model(judge) and (view := judge[1]) is not None]
    return (*roles, *(view.forms for view in (*frozen, models.get("reference")) if view is not None and _share(view, policy)))


def _share(one: View, other: View) -> bool:
    """Whether two models can share a backbone."""
    return (one.base, one.quantization, one.double) == (other.base, other.quantization, other.double)


def _summed(first: Memory, more: list[Memory]) -> Memory:
    for part in more:
        first += part
    return first

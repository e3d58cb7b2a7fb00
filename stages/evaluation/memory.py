"""The memory of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from stages.evaluation.config import EvaluationConfig
from stages.memory.estimate import Machine, Memory, Phase, dtype_bytes, phases
from stages.memory.lengths import Counter, Lengths, prompt_texts, sample
from stages.memory.models import View, decoding_phases, inference_phase, policy_logits
from stages.rewards.config import RewardInput
from stages.rewards.memory import frozen_judge, scoring_phase


def lengths_of(config: EvaluationConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens: of prompts, and of contexts with their longest choice (``text``)."""
    prompts = counter.longest(prompt_texts(config.data, config.prompt_words, split="test"))
    asked = []
    for task in config.tasks.values():
        for row in sample(task.data):
            choices = task.choices if task.choices is not None else row.get("choices")
            longest = max(map(str, choices), key=len, default="") if isinstance(choices, list) else ""
            asked.append(f"{row.get('context', task.context or '')} {longest}")
    return Lengths(prompt=prompts, text=counter.longest(asked) if asked else 0)


def estimate(config: EvaluationConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """One model at a time: candidates, then the value network of the token details, and judges and other reward sources."""
    compute, new = dtype_bytes(config.precision, machine), config.generation.max_new_tokens
    made = [_candidate(config, models[name], lengths, machine, compute) for name in _candidates(config) if name in models]
    for field_path, source in config.rewards().items():
        if (view := models.get(f"{field_path}.model")) is not None:
            judge = (source, view)
            scored = scoring_phase(judge, _completions(config, source), lengths.prompt, new, compute, machine)
            made.append(frozen_judge(judge, compute) + phases(scored))
    if (value := models.get("token_details.value")) is not None:
        read = inference_phase(value, 1, lengths.prompt + new, compute, machine)
        made.append(value.frozen(compute, output=False) + phases(read))
    return max(made, key=lambda memory: memory.total, default=Memory())


def _candidates(config: EvaluationConfig) -> list[str]:
    return [f"candidates.{name}" for name in config.candidates]


def _completions(config: EvaluationConfig, source: RewardInput) -> int:
    """At least as many texts as a pass of the source has; without a number of prompts, passes are full."""
    if config.num_prompts is None:
        return source.batch_size
    return config.num_prompts * config.samples_per_prompt * len(config.candidates)


def _candidate(config: EvaluationConfig, view: View, lengths: Lengths, machine: Machine, compute: int) -> Memory:
    """A candidate answers, and reads its answers and the texts of further measurements."""
    rows, new = config.generation.batch_size, config.generation.max_new_tokens
    measured_phases: list[Phase] = []
    if config.generation.vllm is None:
        measured_phases += decoding_phases(view, rows, lengths.prompt, new, machine, weights=compute, compute=compute)
    if config.kl_reference is not None:
        measured_phases.append(_measured(view, rows, lengths.prompt + new, rows * new, machine, compute))
    if config.tasks and lengths.text:
        measured_phases.append(_measured(view, rows, lengths.text, rows * lengths.text, machine, compute))
    if config.perplexity is not None:
        columns = config.perplexity_block_size
        logits = rows * columns * view.shape.vocabulary * compute
        measured_phases.append(inference_phase(view, rows, columns, compute, machine, logits=logits))
    return view.frozen(compute) + phases(*measured_phases or [Phase()])


def _measured(view: View, rows: int, columns: int, positions: int, machine: Machine, compute: int) -> Phase:
    """A pass that reads the log-probabilities at ``positions``."""
    logits = policy_logits(view, rows * columns, positions, machine, compute=compute)
    return inference_phase(view, rows, columns, compute, machine, logits=logits)

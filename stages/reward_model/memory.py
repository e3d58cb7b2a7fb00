"""The memory of a reward model's training."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import Machine, Memory, dtype_bytes, phases
from stages.memory.lengths import Counter, Lengths, comparison_lengths
from stages.memory.models import (
    View,
    decoding_phases,
    inference_phase,
    is_full_step,
    language_model,
    rows_per_pass,
    saving,
    trained_in_passes,
    trained_model,
    training_phase,
)
from stages.reward_model.collection_config import Collection
from stages.reward_model.config import RewardModelConfig
from stages.rewards.config import RewardInput
from stages.rewards.memory import frozen_judge, scoring_phase


def lengths_of(config: RewardModelConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return comparison_lengths(config.data.train, config.preferred, counter, pairs=False)


def estimate(config: RewardModelConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process: of its training, or of the models that collect comparisons before it."""
    columns = min(config.max_length or models["model"].shape.positions, lengths.comparison)
    made = [_training(config, models["model"], columns, lengths, machine, processes)]
    if config.collect is not None:
        made += _collecting(config.collect, models, columns, machine, dtype_bytes(config.precision, machine))
    return max(made, key=lambda memory: memory.total)


def _training(config: RewardModelConfig, view: View, columns: int, lengths: Lengths, machine: Machine, processes: int) -> Memory:
    compute = dtype_bytes(config.precision, machine)
    prompts = rows_per_pass(config, processes, columns, machine, lengths.examples, texts=lengths.completions)
    rows, full_step = prompts * lengths.completions, is_full_step(config, prompts, processes)
    if config.generative is not None:
        if config.generative.train:
            return language_model(config, view, rows, columns, machine, masked=True, full_step=full_step)
        logits = compute * rows * columns * view.shape.vocabulary
        return view.frozen(compute) + phases(inference_phase(view, rows, columns, compute, machine, logits=logits, masked=True))
    training = training_phase(config, view, rows, columns, machine, logits=0.0, masked=False, task="FEATURE_EXTRACTION")
    model = trained_model(config, view, machine, task="FEATURE_EXTRACTION")
    return trained_in_passes(model, training, saving(view.shape, output=False), full_step=full_step)


def _collecting(collection: Collection, models: Mapping[str, View], columns: int, machine: Machine, compute: int) -> list[Memory]:
    """Each policy that samples completions, and then the judge. Prompts with completions count as long as those of the data."""
    rows, new = collection.generation.batch_size, collection.generation.max_new_tokens
    made = []
    prompt = max(1, columns - new)
    for index in range(len(collection.policies)):
        view = models.get(f"collect.policies[{index}].model")
        if view is not None and collection.generation.vllm is None:
            made.append(view.frozen(compute) + phases(*decoding_phases(view, rows, prompt, new, machine, weights=compute, compute=compute)))
    judge = collection.judge if isinstance(collection.judge, RewardInput) else None
    for field_path in ("collect.judge.model", "collect.judge.people.reward_model"):
        if (view := models.get(field_path)) is not None:
            scorer = (judge or RewardInput.model_validate({"model": "the model of people"}), view)
            scored = scoring_phase(scorer, scorer[0].batch_size, prompt, new, compute, machine)
            made.append(frozen_judge(scorer, compute) + phases(scored))
    return made

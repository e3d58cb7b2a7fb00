"""The memory of a reward model's training."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import FP32, Machine, Memory, dtype_bytes, phases
from stages.memory.lengths import Counter, Lengths, comparison_lengths
from stages.memory.models import View, inference_bytes, language_model, rows_per_pass, saving, trained_model, training_phase
from stages.reward_model.config import RewardModelConfig


def lengths_of(config: RewardModelConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return comparison_lengths(config.data.train, config.preferred, counter, pairs=False)


def estimate(config: RewardModelConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    view, compute = models["model"], dtype_bytes(config.precision, machine)
    columns = min(config.max_length or view.shape.positions, lengths.comparison)
    rows = rows_per_pass(config, processes, columns, machine, lengths.examples, texts=lengths.completions) * lengths.completions
    tokens = rows * columns
    if config.generative is not None:
        if config.generative.train:
            return language_model(config, view, rows, columns, machine)
        return view.frozen(compute) + phases(
            (0.0, inference_bytes(view.shape, rows, columns, compute, machine), FP32 * tokens * view.shape.vocabulary)
        )
    training = training_phase(config, view, rows, columns, machine, logits=0.0, masked=True)
    return trained_model(config, view, machine, output=False) + phases(training, saving(view.shape, output=False))

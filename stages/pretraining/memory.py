"""The memory of a pretraining step."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import Machine, Memory
from stages.memory.lengths import Counter, Lengths
from stages.memory.models import View, is_full_step, language_model, rows_per_pass
from stages.pretraining.config import PretrainingConfig


def lengths_of(config: PretrainingConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return Lengths()


def estimate(config: PretrainingConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    rows = rows_per_pass(config, processes, config.block_size, machine, [(1, config.block_size)])
    return language_model(config, models["model"], rows, config.block_size, machine, full_step=is_full_step(config, rows, processes))

"""The memory of a fine-tuning step."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import Machine, Memory
from stages.memory.lengths import Counter, Lengths, demonstration_lengths
from stages.memory.models import View, is_full_step, keeps_masks, language_model, rows_per_pass
from stages.sft.config import SFTStepConfig


def lengths_of(config: SFTStepConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return demonstration_lengths(config.data.train, counter)


def estimate(config: SFTStepConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    longest = config.max_length or models["model"].shape.positions
    columns = longest if config.packing else min(longest, lengths.demonstration)
    examples = [(1, columns)] if config.packing else [one for one in lengths.examples if one[1] <= columns]  # longer ones are left out
    rows = rows_per_pass(config, processes, columns, machine, examples)
    masked = config.packing or keeps_masks(models["model"])  # the texts of a packed row must not attend to each other
    full_step = is_full_step(config, rows, processes)
    return language_model(config, models["model"], rows, columns, machine, tiled=True, masked=masked, full_step=full_step)

"""The memory of a DPO step."""

from __future__ import annotations

from collections.abc import Mapping

from stages.dpo.config import DPOStepConfig
from stages.memory.estimate import Machine, Memory, dtype_bytes
from stages.memory.lengths import Counter, Lengths, comparison_lengths
from stages.memory.models import View, is_full_step, keeps_masks, language_model, rows_per_pass


def lengths_of(config: DPOStepConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return comparison_lengths(config.data.train, config.preferred, counter, pairs=True)


def estimate(config: DPOStepConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """Both completions of a pair in one pass; plus a frozen reference unless an adapter is trained."""
    view = models["model"]
    columns = min(config.max_length or view.shape.positions, lengths.comparison)
    pairs = rows_per_pass(config, processes, columns, machine, lengths.examples, texts=2)
    full_step = is_full_step(config, pairs, processes)
    made = language_model(config, view, 2 * pairs, columns, machine, tiled=True, masked=keeps_masks(view), full_step=full_step)
    return made if config.lora is not None else made + view.frozen(dtype_bytes(config.precision, machine))

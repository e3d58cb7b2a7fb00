"""The memory of a classifier's training."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import Machine, Memory, activations, dtype_bytes, phases, unchunked_logits
from stages.memory.lengths import Counter, Lengths, sample
from stages.memory.models import View, kept_activations, rows_per_pass, trained_model
from stages.sentiment.config import SentimentConfig


def lengths_of(config: SentimentConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return Lengths(text=counter.longest(str(row.get("text", "")) for row in sample(config.data.train)))


def estimate(config: SentimentConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    view, compute = models["model"], dtype_bytes(config.precision, machine)
    columns = min(config.max_length, lengths.text)
    tokens = rows_per_pass(config, processes) * columns
    kept = kept_activations(config, view.shape, tokens, compute, machine)
    step = trained_model(config, view, machine, output=False) + phases((0.0, kept, 0.0))
    if config.masked is None:
        return step
    masked = config.model_copy(update={"training": config.masked.training, "lora": None})
    tokens = rows_per_pass(masked, processes) * columns
    guessing = (0.0, activations(view.shape, tokens, compute), unchunked_logits(view.shape, tokens))
    first = trained_model(masked, view, machine) + phases(guessing)
    return max(step, first, key=lambda memory: memory.total)

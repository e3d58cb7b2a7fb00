"""The memory of a classifier's training."""

from __future__ import annotations

from collections.abc import Mapping

from stages.memory.estimate import Machine, Memory, phases, unchunked_logits
from stages.memory.lengths import Counter, Lengths, sample
from stages.memory.models import View, is_full_step, rows_per_pass, saving, trained_in_passes, trained_model, training_phase
from stages.sentiment.config import SentimentConfig


def lengths_of(config: SentimentConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    texts = [str(row.get("text", "")) for row in sample(config.data.train)]
    return Lengths(text=counter.longest(texts), examples=counter.examples(texts))


def estimate(config: SentimentConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """The peak memory of the step, per process."""
    view = models["model"]
    columns = min(config.max_length, lengths.text)
    rows = rows_per_pass(config, processes, columns, machine, lengths.examples)
    training = training_phase(config, view, rows, columns, machine, logits=0.0, masked=True, task="SEQ_CLS")
    classifier = view.as_classifier
    model, saved = trained_model(config, classifier, machine, task="SEQ_CLS"), saving(classifier.shape)
    step = trained_in_passes(model, training, saved, full_step=is_full_step(config, rows, processes))
    if config.masked is None:
        return step
    masked = config.model_copy(update={"training": config.masked.training, "lora": None})
    rows = rows_per_pass(masked, processes, columns, machine, lengths.examples)
    guessing = training_phase(masked, view, rows, columns, machine, logits=unchunked_logits(view.shape, rows * columns), masked=True)
    first = trained_model(masked, view, machine) + phases(guessing)
    return max(step, first, key=lambda memory: memory.total)

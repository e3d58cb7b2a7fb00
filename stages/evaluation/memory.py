"""The memory of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from stages.config import SCORING_ROWS
from stages.evaluation.config import EvaluationConfig
from stages.memory.estimate import FP32, Machine, Memory, dtype_bytes, kv_cache, phases
from stages.memory.lengths import Counter, Lengths, prompt_texts
from stages.memory.models import View, inference_bytes, reading


def lengths_of(config: EvaluationConfig, counter: Counter) -> Lengths:
    """The longest texts of the step's data, in tokens."""
    return Lengths(prompt=counter.longest(prompt_texts(config.data, config.prompt_words, split="test")))


def estimate(config: EvaluationConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory:
    """One candidate, then one judge at a time."""
    compute, new = dtype_bytes(config.precision, machine), config.generation.max_new_tokens
    candidates = []
    for field_path, view in models.items():
        if field_path.startswith("judges") or view.shape.encoder:
            read = inference_bytes(view.shape, SCORING_ROWS, lengths.prompt + new, compute, machine)
            candidates.append(view.frozen(compute, output=False) + phases((0.0, read, 0.0)))
            continue
        rows = config.generation.batch_size
        read = reading(view.shape, rows, lengths.prompt, compute, machine)
        cache = kv_cache(view.shape, rows, lengths.prompt, new, compute, machine.kind)
        candidates.append(view.frozen(compute) + phases((cache, read, 3 * FP32 * rows * view.shape.vocabulary)))
    return max(candidates, key=lambda memory: memory.total, default=Memory())

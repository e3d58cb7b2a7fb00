"""Measure how well the model, and other reward sources, agree with held-out comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from stages.corpora.comparisons import Comparison
from stages.corpora.conversations.messages import completion_text
from stages.errors import DataError
from stages.metric_names import HELDOUT_LOG_ACCURACY, HELDOUT_LOG_LOSS
from stages.models.heads import RewardModel
from stages.models.parts import evaluation_mode
from stages.models.sharding import unsharded
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.preferences import NO_PREFERENCE, Agreement, EncodedComparison, agreement
from stages.rewards.building import build_reward
from stages.rewards.learned import score_rows
from stages.step import StepContext


def measure_beside(
    config: RewardModelConfig, context: StepContext, comparisons: Sequence[Comparison], encoded: Sequence[EncodedComparison]
) -> dict[str, dict[str, float]]:
    """Agreement of each source of ``beside`` with the held-out comparisons, by name. One source at a time is in memory."""
    runtime = context.runtime
    prompts = [item.prompt for item in comparisons for _ in item.completions]
    completions = [completion_text(text) for item in comparisons for text in item.completions]
    agreements = {}
    for index, source in enumerate(config.beside):
        own = f"beside[{index}]"
        models = {
            f"beside[0]{field_path.removeprefix(own)}": model for field_path, model in context.models.items() if field_path.startswith(own)
        }
        reward = build_reward(
            [source], models, "beside", device=runtime.device, dtype=runtime.dtype(config.precision), cache_folder=context.cache_folder
        )
        measured = agreement(runtime.decide(partial(reward.score, prompts, completions)).total, encoded)
        name = source.shown_name
        agreements[name] = {
            "accuracy": measured["accuracy"],
            "ci_low": measured["ci_low"],
            "ci_high": measured["ci_high"],
            "pairs": measured["pairs"],
        }
        runtime.console.print(
            f"{context.name}: for comparison, {name}: held-out accuracy {measured['accuracy']:.3f} (95 % {measured['ci_low']:.3f} to "
            f"{measured['ci_high']:.3f})"
        )
    return agreements


def say_measured(context: StepContext, optimizer_step: int, before: Agreement | None, after: Agreement) -> None:
    """Log and print the held-out accuracy. ``before``: that before training; None without training."""
    context.log(optimizer_step, {HELDOUT_LOG_ACCURACY: after["accuracy"], HELDOUT_LOG_LOSS: after["loss"]})
    moved = f"{after['accuracy']:.3f}" if before is None else f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}"
    context.runtime.console.print(
        f"{context.name}: held-out accuracy {moved} (95 % {after['ci_low']:.3f} to {after['ci_high']:.3f}, {after['pairs']} pairs)"
    )


def inference(model: RewardModel) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of input_ids and attention_mask [B, T] that returns the scores [B], without gradients."""

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.score(input_ids, attention_mask)

    return score


def measure(
    model: RewardModel, comparisons: Sequence[EncodedComparison], *, pad_token_id: int, batch_size: int, gain: float = 1.0
) -> Agreement:
    """Agreement of the model's scores with held-out comparisons (stages.reward_model.preferences).

    Raises DataError if no comparison has a preference.
    """
    if not comparisons:
        raise DataError(NO_PREFERENCE)
    rows = [row for item in comparisons for row in item.rows]
    with evaluation_mode(model), unsharded(model):
        device = next(model.parameters()).device
        scores = score_rows(rows, inference(model), pad_token_id, batch_size, device=device, known_by=model)
    return agreement(scores, comparisons, gain=gain)

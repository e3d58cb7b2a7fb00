"""Measure how well the policy, read as an implicit reward model, ranks held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from stages.dpo.config import DPOStepConfig
from stages.dpo.pairs import Pair
from stages.models.parts import evaluation_mode
from stages.models.passes.budget import each_group
from stages.models.passes.responses import Policy, sequence_batch
from stages.models.sharding import unsharded
from stages.stats.intervals import wilson_interval
from stages.step import StepContext

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


def completion_logprobs(
    config: DPOStepConfig, context: StepContext, model: TransformersModel, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Log-probabilities of complete responses [N, 2]: chosen, rejected."""
    model = model.to(context.runtime.device)  # type: ignore[arg-type]  # transformers wraps `to` without its self
    policy = Policy(model, temperature=1.0, autocast=None)
    rows = [(pair.prompt_ids, response) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)]
    sums = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
    size = 4 * config.training.rows_per_pass

    def measure_rows(indices: Sequence[int]) -> None:
        prompts, responses = [rows[index][0] for index in indices], [rows[index][1] for index in indices]
        batch = sequence_batch(prompts, responses, int(tokenizer.pad_token_id), policy.device)
        parts = policy.logprobs(batch).double().cpu().split([len(response) for response in responses])
        sums[list(indices)] = torch.stack([part.sum() for part in parts])

    with evaluation_mode(model), torch.inference_mode(), unsharded(model):
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        each_group(f"{context.name}: measuring", groups, measure_rows, known_by=model)
    return sums.view(-1, 2)


def measure(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> dict[str, float]:
    """How well the implicit reward beta * log(policy / reference) ranks held-out pairs. Log-probabilities [N, 2], chosen first.

    ``chosen_log_ratio``, ``rejected_log_ratio``: change by training in nats. Both decrease if DPO makes all shown completions less likely.
    """
    ratios = policy - reference
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    correct = int((margins > 0).sum())
    low, high = wilson_interval(correct, len(margins))
    return {
        "accuracy": correct / len(margins),
        "ci_low": low,
        "ci_high": high,
        "loss": float(torch.nn.functional.softplus(-margins).mean()),
        "margin": float(margins.mean()),
        "chosen_log_ratio": float(ratios[:, 0].mean()),
        "rejected_log_ratio": float(ratios[:, 1].mean()),
    }

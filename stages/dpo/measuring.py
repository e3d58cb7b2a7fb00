"""How well the policy, as a reward model in disguise, ranks held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stages.dpo.config import DPOStepConfig
from stages.dpo.pairs import Pair
from stages.models.responses import Policy, sequence_batch
from stages.models.sharding import whole
from stages.stats.intervals import wilson_interval
from stages.step import StepContext

# Measuring


def completion_logprobs(
    config: DPOStepConfig, context: StepContext, model: Any, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Log-probabilities of whole completions [N, 2]: the chosen one's, the rejected one's."""
    model = model.to(context.runtime.device)
    training = model.training
    policy = Policy(model.eval(), temperature=1.0, autocast=None)
    rows = [(pair.prompt_ids, response) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)]
    sums = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]) + len(rows[place][1]))
    size = 4 * config.training.microbatch_size
    with torch.inference_mode(), whole(model):
        for start in range(0, len(order), size):
            places = order[start : start + size]
            prompts, responses = [rows[place][0] for place in places], [rows[place][1] for place in places]
            batch = sequence_batch(prompts, responses, int(tokenizer.pad_token_id), policy.device)
            parts = policy.logprobs(batch).double().cpu().split([len(response) for response in responses])
            sums[places] = torch.stack([part.sum() for part in parts])
    model.train(training)
    return sums.view(-1, 2)


def measure(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> dict[str, float]:
    """How well the implicit reward beta * log(policy / reference) ranks held-out pairs. Log-probabilities [N, 2], chosen first.

    ``chosen_log_ratio``, ``rejected_log_ratio``: nats by which the policy moved; both fall where DPO forgets what it was shown.
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

"""Measure a rollout's episodes without gradient: log-probabilities of policy and reference, and values.

B episodes, N response tokens of all episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.kernels.token_budget import tokens_of
from stages.models.layers.compiled import compiled_passes
from stages.models.passes.budget import PassBudget, each_group_together
from stages.models.passes.packing import packed_attention
from stages.models.passes.responses import sequence_batch
from stages.ppo.config import PPOStepConfig
from stages.ppo.roles import Roles

ADVICE = (
    "Lower max_prompt_tokens or generation.max_new_tokens, set offload: true, or use lora, a quantized policy (quantization: nf4) or a "
    "smaller one"
)


def measuring_budget(config: PPOStepConfig, device: torch.device) -> PassBudget:
    """Token budget of the passes that measure a rollout."""
    size = config.microbatch_size if config.microbatch_size == "auto" else config.measuring_rows
    return PassBudget("PPO measuring", device, size, rows=config.measuring_rows, trains=False, advice=ADVICE)


def measure(
    roles: Roles, prompt_ids: Sequence[list[int]], responses: Sequence[list[int]], bootstrap: Tensor, budget: PassBudget, *, recompute: bool
) -> dict[str, Tensor]:
    """Measure B episodes. Returns tensors on the CPU in fp32, all [N] in the order of episodes and tokens.

    ``reference``: log-probabilities of the reference. ``values``. With ``recompute`` also ``sampled``: log-probabilities of the policy.
    ``bootstrap`` [M]: values after the last tokens of the episodes where ``bootstrap`` [B] is True.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    counts = [len(response) for response in responses]
    closes: list[bool] = bootstrap.tolist()
    pieces: dict[str, dict[int, Tensor]] = {}

    def one_pass(rows: list[int]) -> None:
        ends = [index for index, row in enumerate(rows) if closes[row]]
        texts = ([prompt_ids[row] for row in rows], [responses[row] for row in rows])
        batch = sequence_batch(*texts, roles.tokenizer.pad_token_id, roles.policy.device, bootstrap=ends, kernel=kernel)
        num_tokens = len(batch.tokens) - len(ends)
        with packed_attention(batch.packing, *roles.decoders("policy", "reference", "value")):
            values = roles.values(batch)
            measured = {
                "reference": roles.reference_logprobs(batch)[:num_tokens],
                "values": values[:num_tokens],
                "bootstrap": values[num_tokens:],
            }
            if recompute:
                measured["sampled"] = roles.policy.logprobs(batch)[:num_tokens]
        sizes = [counts[row] for row in rows]
        for name, flat in measured.items():
            by_row = flat.float().split([int(closes[row]) for row in rows] if name == "bootstrap" else sizes)
            pieces.setdefault(name, {}).update(zip(rows, by_row, strict=True))

    def counted_pass(rows: list[int]) -> None:
        with budget.one_pass(len(rows), tokens_of(rows, lengths)):
            one_pass(rows)

    # FSDP keeps the buffers of a forward pass for training, where tensors of the inference mode are not allowed.
    without_gradient = torch.no_grad() if roles.are_sharded else torch.inference_mode()
    # Offloaded networks are moved to the device before they are tested for packing.
    with without_gradient, roles.offload.awake(*roles.waiting()):
        kernel = roles.kernel("policy", "reference", "value")
        if roles.are_sharded:
            each_group_together(budget.what, budget.groups(order, lengths), counted_pass, roles.policy.device, advice=budget.advice)
        else:
            with roles.casts_kept(), compiled_passes():
                budget.each(order, lengths, one_pass, packed=kernel is not None)
    return {name: torch.cat([by_row[row] for row in range(len(lengths))]).cpu() for name, by_row in pieces.items()}

"""What the networks say of a rollout's episodes: log-probabilities of policy and reference, and values; without gradient.

B episodes, N response tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.config import AUTO_ROWS
from stages.models.budget import PassBudget
from stages.models.packing import packed_attention
from stages.models.responses import sequence_batch
from stages.ppo.config import PPOStepConfig
from stages.ppo.roles import Roles


def measuring_budget(config: PPOStepConfig, device: torch.device) -> PassBudget:
    """The passes that measure a rollout: without gradients, twice the rows of the update fit."""
    size = config.microbatch_size
    return PassBudget("PPO measuring", device, size if size == "auto" else 2 * size, rows=2 * AUTO_ROWS["ppo"], trains=False)


def measure(
    roles: Roles, prompt_ids: Sequence[list[int]], responses: Sequence[list[int]], closing: Tensor, budget: PassBudget, *, recompute: bool
) -> dict[str, Tensor]:
    """What the networks say of B episodes, on the CPU and fp32, all [N] token by token and episode by episode: ``reference``
    log-probabilities, ``values``, with ``recompute`` the policy's log-probabilities as ``sampled``; and ``closing`` [M], the values after
    the last tokens of the episodes where ``closing`` [B] is True."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    counts = [len(response) for response in responses]
    closes: list[bool] = closing.tolist()
    pieces: dict[str, dict[int, Tensor]] = {}

    def one_pass(rows: list[int]) -> None:
        ends = [place for place, row in enumerate(rows) if closes[row]]
        places = ([prompt_ids[row] for row in rows], [responses[row] for row in rows])
        batch = sequence_batch(*places, roles.tokenizer.pad_token_id, roles.policy.device, closing=ends, kernel=kernel)
        number = len(batch.tokens) - len(ends)
        with packed_attention(batch.packing, *roles.decoders("policy", "reference", "value")):
            values = roles.values(batch)
            found = {"reference": roles.reference_logprobs(batch)[:number], "values": values[:number], "closing": values[number:]}
            if recompute:
                found["sampled"] = roles.policy.logprobs(batch)[:number]
        sizes = [counts[row] for row in rows]
        for name, flat in found.items():
            by_row = flat.float().split([int(closes[row]) for row in rows] if name == "closing" else sizes)
            pieces.setdefault(name, {}).update(zip(rows, by_row, strict=True))

    # The offloaded networks are awake before they are asked whether they can be packed.
    with torch.inference_mode(), roles.offload.awake(*roles.waiting()):
        kernel = roles.kernel("policy", "reference", "value")
        with roles.casts_kept():
            budget.each(order, lengths, one_pass, packed=kernel is not None)
    return {name: torch.cat([by_row[row] for row in range(len(lengths))]).cpu() for name, by_row in pieces.items()}

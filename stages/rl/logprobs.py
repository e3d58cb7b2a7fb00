"""Log-probabilities of given tokens. N positions, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at ``tokens``. logits [..., V], tokens [...]; returns [...] fp32.

    With fp32 logits and temperature 1, no second tensor of the size of the logits is allocated.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). logits [..., V]; returns [...]."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -(logprobs.exp() * logprobs).sum(dim=-1)

"""Choose the next token of each sequence from its logits. B sequences, V vocabulary.

One uniform random number decides each token. So the random stream of a response has one number per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens per block of the two-level search


def sample_tokens(logits: Tensor, noise: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample next tokens from logits [B, V] and noise [B] in [0, 1); returns (tokens [B], their log-probabilities [B] fp32).

    The chosen token is the one where the cumulative distribution exceeds ``noise``. At temperature 0 it is the most likely token. The
    log-probabilities are those of softmax(logits / temperature), before top-k and top-p. For temperature 0 they are computed at
    temperature 1. Where a logit is NaN or infinity, the log-probability is NaN and the token is arbitrary.
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    weights = logits.softmax(dim=-1)  # the sum is 1 up to rounding; dividing by ``total`` removes the rounding error
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        total = weights.sum(dim=-1, dtype=torch.float64)
    elif top_k or top_p < 1:
        total = weights.sum(dim=-1, dtype=torch.float64)
        tokens, _ = invert_cumulative(_truncated(weights, top_k=top_k, top_p=top_p), noise)
    else:
        tokens, total = invert_cumulative(weights, noise)
    chosen = weights.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, (chosen.double() / total).log().float()


def invert_cumulative(weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sum of ``weights`` [B, V] at ``noise`` [B]; returns (index [B], total weight [B] fp64).

    The index is the first one where the cumulative sum exceeds ``noise`` times the total weight. An index with weight 0 is never chosen.
    Sums are in double precision because a chosen token may have a probability of one in a million. The search has two levels: over blocks
    of tokens, then inside one block.
    """
    number, width = weights.shape
    if width % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - width % BLOCK))
    blocks = weights.view(number, -1, BLOCK)
    sums = blocks.sum(dim=-1).double()
    cumulative = sums.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum(noise.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True skips blocks with weight 0
    block = (
        torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp(max=blocks.shape[1] - 1)
    )  # beyond the end if sums are NaN
    rows = torch.arange(number, device=weights.device)
    inside = blocks[rows, block].double()
    running = inside.cumsum(dim=-1)
    # The rest of the target, rescaled to the cumulative sum inside the block: the block's sum and this cumulative sum round differently.
    left = (target - (cumulative[rows, block] - sums[rows, block])) / sums[rows, block] * running[:, -1]
    left = torch.minimum(left.clamp(min=0), torch.nextafter(running[:, -1], torch.zeros_like(left)))
    offset = torch.searchsorted(running, left[:, None], right=True).squeeze(-1)
    return (block * BLOCK + offset).clamp(max=width - 1), total


def _truncated(weights: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set the probabilities that top-k and top-p exclude to 0; the result [B, V] is not normalised.

    Top-k keeps the ``top_k`` largest (0: all). Top-p keeps the smallest set of tokens whose probabilities sum to at least ``top_p``.
    """
    if top_k:
        threshold = weights.topk(min(top_k, weights.shape[-1]), dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < threshold, 0.0)
    if top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        mass = ordered.double() / ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
        # Drop a token if the more likely tokens already reach top_p. The most likely token always stays.
        drop = mass.cumsum(dim=-1) - mass >= top_p
        weights = weights.masked_fill(drop.scatter(-1, order, drop), 0.0)
    return weights

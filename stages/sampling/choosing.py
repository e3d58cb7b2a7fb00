"""Choosing next tokens. B sequences, V vocabulary. One uniform number decides each token, so a random stream is one number per token."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens per block of the two-level search


def sample_tokens(logits: Tensor, noise: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Next tokens [B] for logits [B, V] and noise [B] in [0, 1), and their log-probabilities [B] fp32.

    The token is where the cumulative distribution passes ``noise``; the likeliest at temperature 0. The log-probability is that of
    softmax(logits / temperature) (temperature 1 for the likeliest), before top-k and top-p.
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    weights = logits.softmax(dim=-1)  # their sum is 1 but for rounding, which ``total`` takes out again
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
    """(index [B] where the running sum of ``weights`` [B, V] passes ``noise`` [B] of the whole, that whole [B] fp64).

    Sums are double precision, as a chosen token may be one in a million, but kept in two levels: over blocks, then inside one block. An
    index of weight 0 is never chosen.
    """
    number, width = weights.shape
    if width % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - width % BLOCK))
    blocks = weights.view(number, -1, BLOCK)
    sums = blocks.sum(dim=-1).double()
    cumulative = sums.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum(noise.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True passes over blocks without weight
    block = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    rows = torch.arange(number, device=weights.device)
    inside = blocks[rows, block].double()
    running = inside.cumsum(dim=-1)
    # What is left of the target, as a share of the block: its sum was rounded in another order than this running one.
    left = (target - (cumulative[rows, block] - sums[rows, block])) / sums[rows, block] * running[:, -1]
    left = torch.minimum(left.clamp(min=0), torch.nextafter(running[:, -1], torch.zeros_like(left)))
    place = torch.searchsorted(running, left[:, None], right=True).squeeze(-1)
    return block * BLOCK + place, total


def _truncated(weights: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Unnormalised probabilities [B, V] with all but the ``top_k`` largest (0: all) and the smallest set of mass ``top_p`` set to 0."""
    if top_k:
        threshold = weights.topk(min(top_k, weights.shape[-1]), dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < threshold, 0.0)
    if top_p < 1:
        ordered, places = weights.sort(dim=-1, descending=True)
        mass = ordered.double() / ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
        # A token goes when those before it already hold top_p; the likeliest always stays.
        drop = mass.cumsum(dim=-1) - mass >= top_p
        weights = weights.masked_fill(drop.scatter(-1, places, drop), 0.0)
    return weights

"""Ranking losses of a reward model (Ouyang et al. 2022, equation 1). N completions of several prompts, flattened."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.kernels.transfers import moved_together


def ranking_pairs(ranks: Tensor, prompt_index: Tensor, text_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of all pairs of completions of the same prompt, without ties. ranks [N] (0 best), prompt_index [N].

    ``text_index`` [N]: pairs with equal indices are equal texts and are left out. None: all texts differ. With inputs on the CPU, the CPU
    does not wait for a GPU.
    """
    order = prompt_index.argsort(stable=True)
    sizes = torch.unique_consecutive(prompt_index[order], return_counts=True)[1]
    # All K^2 combinations of each prompt's K completions. A mask of [N, N] would take gigabytes for large held-out data.
    starts, sizes = (sizes.cumsum(0) - sizes).repeat_interleave(sizes), sizes.repeat_interleave(sizes)
    first = torch.arange(len(order), device=order.device).repeat_interleave(sizes)
    second = starts[first] + torch.arange(len(first), device=order.device) - (sizes.cumsum(0) - sizes)[first]
    better, worse = order[first], order[second]
    kept = ranks[better] < ranks[worse]
    if text_index is not None:
        kept &= text_index[better] != text_index[worse]
    return better[kept], worse[kept]


def ranking_losses(scores: Tensor, ranks: Tensor, prompt_index: Tensor, text_index: Tensor | None = None) -> Tensor:
    """-1 / C(K, 2) * sum over a prompt's pairs of log sigmoid(r_better - r_worse), for each prompt [P]. scores, ranks, prompt_index [N].

    Every prompt has the same weight, independent of K: the mean is over its pairs without ties and equal texts (``ranking_pairs``). Prompts
    without a pair are left out of P. If no prompt has a pair, the result is empty, with a gradient of 0. If only
    ``scores`` are on a GPU, the CPU does not wait for it.
    """
    better, worse = ranking_pairs(ranks, prompt_index, text_index)
    if len(better) == 0:
        return scores[:0] + 0.0 * scores.sum()
    prompts, row_of_pair, counts = torch.unique(prompt_index[better], return_inverse=True, return_counts=True)
    better, worse, row_of_pair, counts = moved_together([better, worse, row_of_pair, counts], scores.device)
    losses = -functional.logsigmoid(scores[better] - scores[worse])
    return torch.zeros_like(losses[: len(prompts)]).index_add(0, row_of_pair, losses) / counts.to(losses.dtype)


def ranking_loss(scores: Tensor, ranks: Tensor, prompt_index: Tensor, text_index: Tensor | None = None) -> Tensor:
    """The mean of ``ranking_losses`` over prompts, a scalar; 0 if no prompt has a pair."""
    losses = ranking_losses(scores, ranks, prompt_index, text_index)
    return losses.sum() / max(1, len(losses))


def best_of_losses(scores: Tensor, ranks: Tensor, prompt_index: Tensor, text_index: Tensor | None = None) -> Tensor:
    """Softmax loss of each prompt's best completion among all its completions: -log softmax(scores)[best]. Returns [P].

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2. scores, ranks (0 best) and prompt_index [N]. If several completions
    share the best rank, their losses are averaged. Prompts with only ties are left out of P; if there are no others, the result is empty,
    with a gradient of 0. ``text_index`` [N] is ignored: equal texts compete like others.
    """
    losses = []
    for prompt in prompt_index.unique():
        own = (prompt_index == prompt).nonzero()[:, 0]
        if len(ranks[own].unique()) > 1:
            best = (ranks[own] == ranks[own].min()).nonzero()[:, 0]
            members, best = moved_together([own, best], scores.device)
            losses.append(-scores[members].log_softmax(dim=0)[best].mean())
    return torch.stack(losses) if losses else scores[:0] + 0.0 * scores.sum()

"""The ranking loss of a reward model (Ouyang et al. 2022, equation 1). N completions of several prompts, flattened."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranking_pairs(ranks: Tensor, prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of all pairs of completions of one prompt that are no tie. ranks [N] (0 best), prompt_index [N]."""
    same = prompt_index[:, None] == prompt_index[None, :]
    better, worse = torch.nonzero(same & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    return better, worse


def ranking_loss(scores: Tensor, ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """-1 / C(K, 2) * sum over a prompt's pairs of log sigmoid(r_better - r_worse), averaged over prompts. scores [N]; returns a scalar.

    Every prompt weighs the same whatever its K; ties are dropped, and the pairs left of a prompt share its weight. A prompt that is all
    ties adds nothing and does not count in the average.
    """
    better, worse = ranking_pairs(ranks, prompt_index)
    if len(better) == 0:
        return scores.sum() * 0.0
    losses = -functional.logsigmoid(scores[better] - scores[worse])
    prompts = prompt_index[better]
    _, places, counts = torch.unique(prompts, return_inverse=True, return_counts=True)
    weights = 1.0 / counts.to(losses.dtype)[places]
    return (losses * weights).sum() / len(counts)


def best_of_loss(scores: Tensor, best: Tensor) -> Tensor:
    """Ziegler et al. 2019: -log softmax(scores)[best], averaged over prompts. scores [P, K], best [P]; returns a scalar."""
    return functional.cross_entropy(scores, best)


def best_of_ranked_loss(scores: Tensor, ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """``best_of_loss`` of ranked completions [N]: each prompt's best against all its completions, averaged over prompts.

    Of several that share the best rank the mean counts; a prompt that is all ties adds nothing and does not count in the average.
    """
    total, number = scores.sum() * 0.0, 0
    for prompt in prompt_index.unique():
        own = prompt_index == prompt
        if len(ranks[own].unique()) > 1:
            best = ranks[own] == ranks[own].min()
            total = total - scores[own].log_softmax(dim=0)[best].mean()
            number += 1
    return total / max(number, 1)


def pairwise_correct(scores: Tensor, ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """For each pair that is no tie, whether the better completion scores higher; equal scores are wrong. Returns [pairs] bool."""
    better, worse = ranking_pairs(ranks, prompt_index)
    return scores[better] > scores[worse]

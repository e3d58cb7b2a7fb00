"""Losses on the log-probabilities of given tokens, computed from hidden states with the logits of only a few positions at a time.

N positions, d hidden size, V vocabulary. The logits [N, V] are by far the largest tensor of an update (three such tensors in fp32, with
gradient and softmax). Here a chunk of them is computed, used for the loss and its gradient, and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from stages.kernels.casts import cast
from stages.kernels.matmul import Context, linear, product
from stages.kernels.token_budget import CHUNK_BYTES

Term = Callable[[Tensor, Tensor, slice], Tensor]
"""term(logprobs, entropies, rows) -> loss per position, all [n]. ``rows``: the chunk's positions among all N."""


def chosen_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``tokens`` [N] and entropies [N] (fp32, without gradient) of softmax((hidden weight^T + bias) / temperature).

    hidden [N, d], weight [V, d], bias [V].
    """
    with torch.no_grad():
        chunks = [_of_chunk(logits, tokens[rows])[:2] for rows, logits in _chunks(hidden.detach(), weight, bias, temperature=temperature)]
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def summed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, term: Term, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of ``term`` over all positions, with gradient; log-probabilities [N] and entropies [N], without). Arguments as above.

    The gradient of a token's log-probability has a closed form (one-hot minus softmax, divided by the temperature). So it is computed
    together with each chunk of logits, from the derivative of ``term``; the backward pass only scales it.
    """
    return _SummedLoss.apply(hidden, weight, bias, tokens, term, temperature)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield (positions, their fp32 logits divided by the temperature [n, V]) per chunk. Matrix products use autocast's dtype."""
    dtype = _compute_dtype(hidden, weight)
    matrix, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
    size = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (4 * weight.shape[0]))
    with _no_autocast(hidden):
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            logits = linear(hidden[rows].to(dtype), matrix, bias).float()
            yield rows, logits.div_(temperature) if temperature != 1.0 else logits


def _of_chunk(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropies [n] and probabilities [n, V]. Modifies ``logits`` [n, V] in place: subtracts each row's maximum."""
    logits -= logits.amax(dim=-1, keepdim=True)
    probabilities = logits.exp()
    total = probabilities.sum(dim=-1, keepdim=True)
    probabilities /= total
    shift = total.log().squeeze(-1)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - shift
    # -sum p log p with log p = logits - shift; a logit of -inf has probability 0, so clamping it does not change the sum
    entropies = shift - torch.linalg.vecdot(probabilities, logits.clamp_(min=torch.finfo(torch.float32).min))
    return logprobs, entropies, probabilities


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, term: Term, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = _compute_dtype(hidden, weight)
        matrix = cast(weight, dtype)
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        bias_gradient = torch.zeros_like(bias) if wants_bias and bias is not None else None
        loss = torch.zeros((), device=hidden.device)
        all_logprobs, all_entropies = [], []
        for rows, logits in _chunks(hidden, weight, bias, temperature=temperature):
            logprobs, entropies, probabilities = _of_chunk(logits, tokens[rows])
            summed, of_logprobs, of_entropies = _derivatives(term, logprobs, entropies, rows)
            loss += summed
            all_logprobs.append(logprobs)
            all_entropies.append(entropies)
            if not any(ctx.needs_input_grad[:3]):
                continue
            gradient = _logit_gradient(logits, tokens[rows], logprobs, entropies, probabilities, of_logprobs, of_entropies)
            if temperature != 1.0:
                gradient /= temperature
            with _no_autocast(hidden):
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[rows] = product(gradient, matrix).to(hidden.dtype)
                if weight_gradient is not None:
                    weight_gradient += product(gradient.T, hidden[rows].to(dtype))
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        empty = hidden.new_zeros(0, dtype=torch.float32)
        logprobs, entropies = torch.cat([empty, *all_logprobs]), torch.cat([empty, *all_entropies])
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because these buffers are used only in this backward pass.
        gradients = [None if gradient is None else gradient.mul_(upstream[0]) for gradient in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _derivatives(term: Term, logprobs: Tensor, entropies: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (sum of the term, its derivative by each log-probability [n], by each entropy [n] or None if it does not depend on them)."""
    with torch.enable_grad():
        leaves = logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()
        summed = term(*leaves, rows).sum()
        if not summed.requires_grad:
            return summed, torch.zeros_like(logprobs), None
        of_logprobs, of_entropies = torch.autograd.grad(summed, leaves, allow_unused=True)
    return summed.detach(), torch.zeros_like(logprobs) if of_logprobs is None else of_logprobs, of_entropies


def _logit_gradient(
    logits: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    entropies: Tensor,
    probabilities: Tensor,
    of_logprobs: Tensor,
    of_entropies: Tensor | None,
) -> Tensor:
    """Gradient with respect to the logits [n, V]. d logprob = onehot - p; d entropy = -p (log p + entropy). Modifies ``probabilities`` and
    ``logits`` in place."""
    token_column = tokens[:, None]
    scale = -of_logprobs[:, None]
    if of_entropies is not None:
        shift = logits.gather(-1, token_column) - logprobs[:, None]  # log p = logits - shift
        logits += entropies[:, None] - shift
        logits *= -of_entropies[:, None]
        scale = logits.add_(scale)
    probabilities *= scale
    return probabilities.scatter_add_(-1, token_column, of_logprobs[:, None])


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _no_autocast(hidden: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(hidden.device.type, enabled=False)

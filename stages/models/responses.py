"""What a language model says of given responses: their log-probabilities, entropies and values, at response tokens and nowhere else.

B sequences, T = prompt and response, N response tokens of a batch, V vocabulary, d hidden size. Rows are right padded here: a forward
pass over whole sequences needs no common end of the prompts, and rows of like length waste least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.kernels.matmul import Linear
from stages.kernels.output_layer import Term, chosen_logprobs, summed_loss
from stages.models.heads import ValueModel
from stages.models.output_path import multiplies_directly
from stages.models.parts import transformer_of
from stages.rl.logprobs import entropy, token_logprobs
from stages.sampling.generation import right_pad


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences (prompt, then response) as right-padded ids [B, T], and how long each is [B].

    ``rows``, ``columns`` [N] name the positions that predict the response tokens, row by row; ``tokens`` [N] are those tokens. There is no
    attention mask: a causal model never looks to the right, where the padding is, and without a mask the fastest kernels can be used.
    """

    input_ids: Tensor
    lengths: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor


def sequence_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> SequenceBatch:
    """Join prompts and responses (token ids) row by row."""
    ids = right_pad([torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)], pad_token_id)
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    counts = torch.tensor([len(response) for response in responses])
    rows = torch.repeat_interleave(torch.arange(len(prompts)), counts)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])  # number of each row's first response token among all N
    columns = starts[rows] + torch.arange(len(rows)) - first[rows]
    tokens = torch.tensor([token for response in responses for token in response], dtype=torch.long)
    moved = [tensor.to(device) for tensor in (ids, starts + 1 + counts, rows, columns, tokens)]
    return SequenceBatch(*moved)


def with_closing(batch: SequenceBatch, closing: Tensor) -> SequenceBatch:
    """``batch`` with one more position for each row of ``closing`` [B] bool, behind all the others: the row's last token, which predicts
    nothing. A value there is that of the state after the response; a log-probability there means nothing."""
    rows = torch.nonzero(closing).flatten().to(batch.rows.device)  # counted where it lies: on a GPU that would wait for it
    return SequenceBatch(
        batch.input_ids,
        batch.lengths,
        rows=torch.cat([batch.rows, rows]),
        columns=torch.cat([batch.columns, batch.lengths[rows] - 1]),
        tokens=torch.cat([batch.tokens, torch.zeros_like(rows)]),
    )


@dataclass(frozen=True)
class PolicyLoss:
    """A loss summed over response tokens, with gradient; log-probabilities and entropies [N] without; values [N] with a shared head."""

    summed: Tensor
    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None


class Policy:
    """A causal language model, its temperature, and the way from its hidden states to the log-probabilities of chosen tokens."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float,
        autocast: torch.dtype | None,
        shared_value_head: nn.Linear | None = None,
        activate: Callable[[], None] | None = None,
    ) -> None:
        """``activate``: what lets this role's adapters act, where its backbone carries those of others, too."""
        self.model, self.temperature, self.autocast = model, temperature, autocast
        self.value_head = shared_value_head
        self.activate = activate or (lambda: None)
        self.device = next(model.parameters()).device
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = transformer_of(model)
        self.output = plain.get_output_embeddings()
        self.activate()
        # Some families rescale or cap their logits behind the output matrix; then the model has to make them itself.
        self.is_direct = type(self.output) in (nn.Linear, Linear) and multiplies_directly(model, self.decoder, self.output, self.precision)

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision of forward passes where the weights are wider than what the hardware computes in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states of right-padded ids [B, T]; returns [B, T, d]."""
        self.activate()
        with self.precision():
            return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state

    def logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities of the response tokens [N] fp32, at the sampling temperature; without gradient."""
        with torch.no_grad():
            if not self.is_direct:
                return token_logprobs(self._logits(batch), batch.tokens, temperature=self.temperature)
            hidden = self.hidden(batch.input_ids)[batch.rows, batch.columns]
            with self.precision():
                return chosen_logprobs(hidden, self.output.weight, self.output.bias, batch.tokens, temperature=self.temperature)[0]

    def loss(self, batch: SequenceBatch, term: Term, *, num_tokens: int | None = None, temperature: float | None = None) -> PolicyLoss:
        """The sum of ``term`` over the first ``num_tokens`` positions of the batch (None: all); values are those of all positions.

        ``temperature``: of the log-probabilities, where it is not the sampling temperature.
        """
        tokens = batch.tokens[:num_tokens]
        temperature = self.temperature if temperature is None else temperature
        if not self.is_direct:
            return self._loss_of_logits(batch, term, tokens, temperature)
        hidden = self.hidden(batch.input_ids)[batch.rows, batch.columns]
        with self.precision():
            found = summed_loss(hidden[: len(tokens)], self.output.weight, self.output.bias, tokens, term, temperature=temperature)
        return PolicyLoss(*found, values=self._values(hidden))

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values of the shared head [N]."""
        values = self._values(self.hidden(batch.input_ids)[batch.rows, batch.columns])
        assert values is not None
        return values

    def _values(self, hidden: Tensor) -> Tensor | None:
        return None if self.value_head is None else self.value_head(hidden.float()).squeeze(-1)

    def _logits(self, batch: SequenceBatch) -> Tensor:
        """Logits [N, V] of a model that has to make them itself."""
        self.activate()
        with self.precision():
            return self.model(input_ids=batch.input_ids, use_cache=False).logits[batch.rows, batch.columns]

    def _loss_of_logits(self, batch: SequenceBatch, term: Term, tokens: Tensor, temperature: float) -> PolicyLoss:
        hidden = self.hidden(batch.input_ids)[batch.rows, batch.columns] if self.value_head is not None else None
        logits = self._logits(batch)[: len(tokens)]
        logprobs, entropies = token_logprobs(logits, tokens, temperature=temperature), entropy(logits, temperature=temperature)
        summed = term(logprobs, entropies, slice(0, len(tokens))).sum()
        return PolicyLoss(summed, logprobs.detach(), entropies.detach(), None if hidden is None else self._values(hidden))


def sequence_values(model: ValueModel, batch: SequenceBatch, precision: AbstractContextManager[Any]) -> Tensor:
    """Values before each response token [N] fp32: the value network read at the position that predicts the token."""
    with precision:
        return model.score_positions(batch.input_ids, batch.rows, batch.columns)

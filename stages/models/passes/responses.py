"""Outputs of a language model for given responses: log-probabilities, entropies and values at the response tokens only.

B sequences, T = prompt and response, S tokens of all sequences, N response tokens of a batch, V vocabulary, d hidden size. Rows are right
padded: a forward pass over full sequences does not need prompts that end at the same column, and grouping rows of similar length minimizes
padding. Packed sequences are one row without padding (models/passes/packing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages.kernels.matmul import Linear
from stages.kernels.output_layer import Term, chosen_logprobs, summed_loss
from stages.kernels.transfers import moved_together
from stages.models.heads import ScalarHead, ValueModel, hidden_states
from stages.models.layers.longrope import positions_of_rows
from stages.models.parts import transformer_of
from stages.models.passes.output_path import multiplies_directly
from stages.models.passes.packing import Packing, one_sequence_per_row, packed_attention, packing_indices, packing_kernel
from stages.rl.logprobs import entropy, token_logprobs
from stages.sampling.padding import right_pad
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences (prompt, then response) as right-padded ids [B, T], or packed into one row [1, S].

    ``rows``, ``columns`` [N]: the positions in ``input_ids`` that predict the response tokens, sequence by sequence; ``tokens`` [N]: those
    tokens. If requested, the positions of the states after the responses follow, with token 0. ``lengths`` [B]: of the sequences. There is
    no attention mask: a causal model does not attend to the padding on the right, and without a mask the fastest kernels can be used.
    """

    input_ids: Tensor
    lengths: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    packing: Packing | None = None


def sequence_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str,
    *,
    bootstrap: Sequence[int] = (),
    kernel: str | None = None,
) -> SequenceBatch:
    """Join prompts and responses (token ids).

    ``bootstrap``: sequences whose last token is an additional position, after all others. It predicts no token: a value there is that of
    the state after the response, a log-probability is meaningless. ``kernel``: pack the sequences, with this attention kernel; None: pad
    them.
    """
    joined = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(sequence) for sequence in joined]
    ends = torch.tensor(lengths)
    counts = torch.tensor([len(response) for response in responses])
    number = sum(len(response) for response in responses)
    rows = torch.repeat_interleave(torch.arange(len(joined)), counts, output_size=number)
    first = counts.cumsum(0) - counts  # index of each row's first response token among all N
    columns = (ends - counts - 1)[rows] + torch.arange(number) - first[rows]
    tokens = torch.tensor([token for response in responses for token in response] + [0] * len(bootstrap), dtype=torch.long)
    last = torch.tensor(list(bootstrap), dtype=torch.long)
    rows, columns = torch.cat([rows, last]), torch.cat([columns, ends[last] - 1])
    if kernel is None:
        ids = right_pad([torch.tensor(sequence) for sequence in joined], pad_token_id)
        ids, ends, rows, columns, tokens = moved_together([ids, ends, rows, columns, tokens], device)
        return SequenceBatch(ids, ends, rows, columns, tokens)
    indices = packing_indices(lengths)
    ids = torch.tensor([token for sequence in joined for token in sequence])[None]
    rows, columns = torch.zeros_like(rows), indices[1][rows] + columns
    ids, ends, rows, columns, tokens, positions, starts, padded, kept = moved_together([ids, ends, rows, columns, tokens, *indices], device)
    packing = Packing(positions, starts.to(torch.int32), padded, kept, tuple(lengths), kernel)
    return SequenceBatch(ids, ends, rows, columns, tokens, packing)


def repeated(batch: SequenceBatch) -> SequenceBatch:
    """A batch with all sequences of ``batch`` two times: the first half of its tokens, and of its positions [2 N], is ``batch``."""
    rows, columns, lengths, tokens = batch.rows.repeat(2), batch.columns.repeat(2), batch.lengths.repeat(2), batch.tokens.repeat(2)
    number = len(batch.rows)
    if batch.packing is None:
        rows[number:] += len(batch.input_ids)
        return SequenceBatch(batch.input_ids.repeat(2, 1), lengths, rows, columns, tokens)
    columns[number:] += batch.input_ids.shape[1]
    return SequenceBatch(batch.input_ids.repeat(1, 2), lengths, rows, columns, tokens, batch.packing.twice())


@dataclass(frozen=True)
class PolicyLoss:
    """A loss summed over response tokens, with gradient; log-probabilities and entropies [N] without gradient; values [N] with a shared
    head.
    """

    summed: Tensor
    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None


class Policy:
    """A causal language model with a temperature, and the computation of token log-probabilities from its hidden states."""

    def __init__(
        self,
        model: TransformersModel,
        *,
        temperature: float,
        autocast: torch.dtype | None,
        shared_value_head: ScalarHead | None = None,
        activate: Callable[[], None] | None = None,
    ) -> None:
        """``activate``: activates this role's adapters, if its backbone also has those of other roles."""
        self.model, self.temperature, self.autocast = model, temperature, autocast
        self.value_head = shared_value_head
        self.activate = activate or (lambda: None)
        self.device = next(model.parameters()).device
        plain = plain_model(model)
        self.decoder = transformer_of(model)
        self.output = plain.get_output_embeddings()
        self.activate()
        # Some families rescale or cap the logits after the output matrix; then the model itself must compute them.
        self.is_direct = type(self.output) in (nn.Linear, Linear) and multiplies_directly(model, self.decoder, self.output, self.precision)

    def precision(self) -> AbstractContextManager[object]:
        """Mixed precision of forward passes, if the weights have a higher precision than the computation."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def kernel(self) -> str | None:
        """The kernel for packed passes of this model; None if they are padded (the reason is logged once)."""
        self.activate()
        return packing_kernel(self.decoder, self.precision)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """Hidden states [B, T, d], or [1, S, d] for a packed batch."""
        self.activate()
        with self.precision():
            return hidden_states(self.decoder, batch.input_ids, batch.packing, batch.lengths)

    def logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities of the response tokens [N] in fp32, at the sampling temperature, without gradient."""
        with torch.no_grad():
            if not self.is_direct:
                return token_logprobs(self._logits(batch), batch.tokens, temperature=self.temperature)
            hidden = self.hidden(batch)[batch.rows, batch.columns]
            with self.precision():
                return chosen_logprobs(hidden, self.output.weight, self.output.bias, batch.tokens, temperature=self.temperature)[0]

    def loss(self, batch: SequenceBatch, term: Term, *, num_tokens: int | None = None, temperature: float | None = None) -> PolicyLoss:
        """The sum of ``term`` over the first ``num_tokens`` positions of the batch (None: all), and values at all positions.

        ``temperature``: of the log-probabilities, if it differs from the sampling temperature.
        """
        tokens = batch.tokens[:num_tokens]
        temperature = self.temperature if temperature is None else temperature
        if not self.is_direct:
            return self._loss_of_logits(batch, term, tokens, temperature)
        return self.loss_of(self.hidden(batch)[batch.rows, batch.columns], tokens, term, temperature)

    def loss_of(self, hidden: Tensor, tokens: Tensor, term: Term, temperature: float) -> PolicyLoss:
        """The sum of ``term`` over ``tokens`` [n], from the hidden states [N, d] of all positions, those of the tokens first.

        Only for a model whose logits are a plain product (``is_direct``).
        """
        with self.precision():
            sums = summed_loss(hidden[: len(tokens)], self.output.weight, self.output.bias, tokens, term, temperature=temperature)
        return PolicyLoss(*sums, values=self._values(hidden))

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values of the shared head [N]."""
        values = self._values(self.hidden(batch)[batch.rows, batch.columns])
        assert values is not None
        return values

    def _values(self, hidden: Tensor) -> Tensor | None:
        return None if self.value_head is None else self.value_head(hidden)

    def _logits(self, batch: SequenceBatch) -> Tensor:
        """Logits [N, V] computed by the model itself."""
        self.activate()
        if batch.packing is None:
            positions, rows = positions_of_rows(self.decoder, batch.input_ids, batch.lengths), one_sequence_per_row()
        else:
            positions, rows = {"position_ids": batch.packing.positions}, packed_attention(batch.packing, self.decoder)
        with self.precision(), rows:
            return self.model(input_ids=batch.input_ids, use_cache=False, **positions).logits[batch.rows, batch.columns]

    def _loss_of_logits(self, batch: SequenceBatch, term: Term, tokens: Tensor, temperature: float) -> PolicyLoss:
        hidden = self.hidden(batch)[batch.rows, batch.columns] if self.value_head is not None else None
        logits = self._logits(batch)[: len(tokens)].float()  # once for both
        logprobs, entropies = token_logprobs(logits, tokens, temperature=temperature), entropy(logits, temperature=temperature)
        summed = term(logprobs, entropies, slice(0, len(tokens))).sum()
        return PolicyLoss(summed, logprobs.detach(), entropies.detach(), None if hidden is None else self._values(hidden))


def loss_and_values(policy: Policy, value: ValueModel, batch: SequenceBatch, term: Term, *, num_tokens: int) -> tuple[PolicyLoss, Tensor]:
    """``policy.loss`` and ``sequence_values`` of a batch in one pass through the backbone that both share.

    ``batch`` comes from ``repeated``: its first half is the policy's, the second one the value network's. Call it inside
    ``roles_together``. Returns (loss of the first ``num_tokens`` positions, values [N] in fp32).
    """
    with policy.precision():
        hidden = hidden_states(policy.decoder, batch.input_ids, batch.packing, batch.lengths)[batch.rows, batch.columns]
    of_policy, of_value = hidden.chunk(2)
    loss = policy.loss_of(of_policy, batch.tokens[:num_tokens], term, policy.temperature)
    return loss, value.score_head(of_value)


def sequence_values(model: ValueModel, batch: SequenceBatch, precision: AbstractContextManager[object]) -> Tensor:
    """Values before each response token [N] in fp32: the value network's output at the position that predicts the token."""
    with precision:
        return model.score_positions(batch.input_ids, batch.rows, batch.columns, batch.packing, batch.lengths)

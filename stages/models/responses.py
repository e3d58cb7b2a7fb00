"""What a language model says of given responses: their log-probabilities, entropies and values, at response tokens and nowhere else.

B sequences, T = prompt and response, N response tokens of a batch, V vocabulary, d hidden size. Rows are right padded here: a forward
pass over whole sequences needs no common end of the prompts, and rows of like length waste least.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.generation import right_pad
from stages.models.heads import ValueModel
from stages.numerics.logprobs import entropy, token_logprobs


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences (prompt, then response) as right-padded ids and mask [B, T].

    ``rows``, ``columns`` [N] name the positions that predict the response tokens, row by row; ``tokens`` [N] are those tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor


def sequence_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> SequenceBatch:
    """Join prompts and responses (token ids) row by row."""
    ids = right_pad([torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)], pad_token_id)
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.tensor([row for row, response in enumerate(responses) for _ in response])
    columns = torch.tensor(
        [len(prompt) - 1 + step for prompt, response in zip(prompts, responses, strict=True) for step in range(len(response))]
    )
    tokens = torch.tensor([token for response in responses for token in response])
    return SequenceBatch(ids.to(device), mask.to(device), rows.to(device), columns.to(device), tokens.to(device))


def with_closing(batch: SequenceBatch, closing: Tensor) -> SequenceBatch:
    """``batch`` with one more position for each row of ``closing`` [B] bool, behind all the others: the row's last token, which predicts
    nothing. A value there is that of the state after the response; a log-probability there means nothing."""
    rows = torch.nonzero(closing.to(batch.rows.device)).flatten()
    last = batch.attention_mask.sum(dim=1)[rows] - 1
    return SequenceBatch(
        batch.input_ids,
        batch.attention_mask,
        rows=torch.cat([batch.rows, rows]),
        columns=torch.cat([batch.columns, last]),
        tokens=torch.cat([batch.tokens, torch.zeros_like(rows)]),
    )


class Policy:
    """A causal language model, its temperature, and the way from its hidden states to logits at chosen positions only."""

    def __init__(self, model: Any, *, temperature: float, autocast: torch.dtype | None, shared_value_head: nn.Linear | None = None) -> None:
        self.model, self.temperature, self.autocast = model, temperature, autocast
        self.value_head = shared_value_head
        self.device = next(model.parameters()).device
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = getattr(plain, plain.base_model_prefix)
        self.output = plain.get_output_embeddings()
        # Some families rescale or cap their logits behind the output matrix; then the model has to make them itself.
        self.is_direct = self._direct_equals_model()

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision of forward passes where the weights are wider than what the hardware computes in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """Hidden states at the positions that predict response tokens [N, d]."""
        with self.precision():
            states = self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        return states[batch.rows, batch.columns]

    def logits(self, batch: SequenceBatch, hidden: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the response tokens, and of nothing else."""
        with self.precision():
            if self.is_direct:
                return self.output(self.hidden(batch) if hidden is None else hidden)
            made = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return made[batch.rows, batch.columns]

    def logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities of the response tokens [N] fp32, at the sampling temperature."""
        return token_logprobs(self.logits(batch), batch.tokens, temperature=self.temperature)

    def logprobs_entropy_values(self, batch: SequenceBatch, *, want_entropy_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities, entropies and, with a shared value head, values: each [N] fp32."""
        hidden = self.hidden(batch) if self.is_direct or self.value_head is not None else None
        logits = self.logits(batch, hidden)
        logprobs = token_logprobs(logits, batch.tokens, temperature=self.temperature)
        entropies = entropy(logits if want_entropy_gradient else logits.detach(), temperature=self.temperature)
        values = self.value_head(hidden.float()).squeeze(-1) if self.value_head is not None and hidden is not None else None
        return logprobs, entropies, values

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values of the shared head [N]."""
        assert self.value_head is not None
        return self.value_head(self.hidden(batch).float()).squeeze(-1)

    @torch.no_grad()
    def _direct_equals_model(self) -> bool:
        if self.output is None:
            return False
        training = self.model.training
        self.model.eval()
        ids = torch.arange(2, 6, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        with self.precision():
            direct = self.output(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
        self.model.train(training)
        return torch.allclose(direct, whole, rtol=1e-3, atol=1e-3)


def sequence_values(model: ValueModel, batch: SequenceBatch, precision: AbstractContextManager[Any]) -> Tensor:
    """Values before each response token [N] fp32: the value network read at the position that predicts the token."""
    with precision:
        return model.score_tokens(batch.input_ids, batch.attention_mask)[batch.rows, batch.columns]

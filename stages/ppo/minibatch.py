"""The episodes of one optimizer step, as the update needs them pass by pass: token ids, and what the losses need of each token.

B episodes of the minibatch, R response tokens; N positions of a pass, those of the response tokens first and then those of the states after
the responses, where such a state counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.models.responses import SequenceBatch, moved_together, sequence_batch
from stages.ppo.rollout import Rollout, Targets


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass is computed from. ``num_tokens`` positions are response tokens; all N have a value."""

    batch: SequenceBatch
    num_tokens: int
    rollout_logprobs: Tensor  # [num_tokens]
    advantages: Tensor  # [num_tokens]
    rollout_values: Tensor  # [N]
    returns: Tensor  # [N]
    importance: Tensor | None = None  # [num_tokens] weights of the policy's loss, where another engine sampled


class Minibatch:
    """Episodes and their targets on ``device``: moved there once, and picked out there for each pass. Nothing is read back.

    ``importance`` [B, R]: weights of the policy's loss of each token; None: they all count alike.
    """

    def __init__(self, part: Rollout, goal: Targets, *, pad_token_id: int, device: torch.device, importance: Tensor | None = None) -> None:
        self.device, self._pad_token_id = device, pad_token_id
        self._prompts = part.prompt_ids
        counts: list[int] = part.lengths.tolist()
        self._responses = [ids[:count] for ids, count in zip(part.response_ids.tolist(), counts, strict=True)]
        self._closing: list[bool] = part.closing_mask.tolist()
        self.lengths = [len(prompt) + count for prompt, count in zip(self._prompts, counts, strict=True)]
        self.num_tokens = sum(counts)
        self.num_states = self.num_tokens + sum(self._closing)
        # [4 or 5, B, R + 1]: the last column is for the state after the response, which has neither log-probability nor advantage.
        none = torch.zeros_like(part.closing_values)
        columns = [
            (part.rollout_logprobs, none),
            (goal.advantages, none),
            (part.values, part.closing_values),
            (goal.returns, goal.closing_returns),
            *([] if importance is None else [(importance, none)]),
        ]
        (self._numbers,) = moved_together([torch.stack([torch.cat([tokens, end[:, None]], dim=1) for tokens, end in columns])], device)
        self._last_column = part.response_mask.shape[1]

    def __len__(self) -> int:
        return len(self._prompts)

    def pick(self, rows: Sequence[int], *, kernel: str | None) -> Pass:
        """The episodes ``rows``, padded, or packed where a ``kernel`` is given."""
        responses = [self._responses[row] for row in rows]
        closing = [place for place, row in enumerate(rows) if self._closing[row]]
        prompts = [self._prompts[row] for row in rows]
        batch = sequence_batch(prompts, responses, self._pad_token_id, self.device, closing=closing, kernel=kernel)
        counts = torch.tensor([len(response) for response in responses])
        number = sum(len(response) for response in responses)
        owners = torch.repeat_interleave(torch.tensor(list(rows)), counts, output_size=number)
        places = torch.arange(number) - (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=number)
        ends = torch.tensor([rows[place] for place in closing], dtype=torch.long)
        owners, places = torch.cat([owners, ends]), torch.cat([places, torch.full_like(ends, self._last_column)])
        owners, places = moved_together([owners, places], self.device)
        logprobs, advantages, values, returns, *weights = self._numbers[:, owners, places].unbind()
        importance = weights[0][:number] if weights else None
        return Pass(batch, number, logprobs[:number], advantages[:number], values, returns, importance)

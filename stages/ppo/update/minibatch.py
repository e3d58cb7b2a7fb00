"""The episodes of one minibatch, and what the losses need per token, by forward pass.

B episodes of the minibatch, R response tokens; N positions of a pass: first those of the response tokens, then those of the states after
the responses, if they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.kernels.transfers import moved_together
from stages.models.passes.responses import SequenceBatch, sequence_batch
from stages.ppo.rollout.rollout import Rollout
from stages.ppo.update.targets import Targets


@dataclass(frozen=True)
class Pass:
    """Inputs of one forward and backward pass. ``num_tokens`` positions are response tokens; all N positions have a value."""

    batch: SequenceBatch
    num_tokens: int
    rollout_logprobs: Tensor  # [num_tokens]
    advantages: Tensor  # [num_tokens]
    rollout_values: Tensor  # [N]
    returns: Tensor  # [N]
    importance: Tensor | None = None  # [num_tokens] weights of the policy's loss if another engine sampled


class Minibatch:
    """Episodes and their targets on ``device``. They are moved there once and selected there for each pass, without reading them back.

    ``importance`` [B, R]: weights of each token in the policy's loss; None: equal weights.
    """

    def __init__(
        self, part: Rollout, targets: Targets, *, pad_token_id: int, device: torch.device, importance: Tensor | None = None
    ) -> None:
        self.device, self._pad_token_id = device, pad_token_id
        self._prompts = part.prompt_ids
        counts: list[int] = part.lengths.tolist()
        self._responses = [ids[:count] for ids, count in zip(part.response_ids.tolist(), counts, strict=True)]
        self._bootstrap: list[bool] = part.bootstrap_mask.tolist()
        self.lengths = [len(prompt) + count for prompt, count in zip(self._prompts, counts, strict=True)]
        self.num_tokens = sum(counts)
        self.num_states = self.num_tokens + sum(self._bootstrap)
        # [4 or 5, B, R + 1]: the last column is the state after the response, which has neither log-probability nor advantage.
        none = torch.zeros_like(part.bootstrap_values)
        columns = [
            (part.rollout_logprobs, none),
            (targets.advantages, none),
            (part.values, part.bootstrap_values),
            (targets.returns, targets.bootstrap_returns),
            *([] if importance is None else [(importance, none)]),
        ]
        (self._numbers,) = moved_together([torch.stack([torch.cat([tokens, end[:, None]], dim=1) for tokens, end in columns])], device)
        self._last_column = part.response_mask.shape[1]

    def __len__(self) -> int:
        return len(self._prompts)

    def pick(self, rows: Sequence[int], *, kernel: str | None) -> Pass:
        """The episodes ``rows``, padded, or packed if a ``kernel`` is given."""
        responses = [self._responses[row] for row in rows]
        bootstrap = [index for index, row in enumerate(rows) if self._bootstrap[row]]
        prompts = [self._prompts[row] for row in rows]
        batch = sequence_batch(prompts, responses, self._pad_token_id, self.device, bootstrap=bootstrap, kernel=kernel)
        counts = torch.tensor([len(response) for response in responses])
        num_tokens = sum(len(response) for response in responses)
        owners = torch.repeat_interleave(torch.tensor(list(rows)), counts, output_size=num_tokens)
        columns = torch.arange(num_tokens) - (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=num_tokens)
        ends = torch.tensor([rows[index] for index in bootstrap], dtype=torch.long)
        owners, columns = torch.cat([owners, ends]), torch.cat([columns, torch.full_like(ends, self._last_column)])
        owners, columns = moved_together([owners, columns], self.device)
        logprobs, advantages, values, returns, *weights = self._numbers[:, owners, columns].unbind()
        importance = weights[0][:num_tokens] if weights else None
        return Pass(batch, num_tokens, logprobs[:num_tokens], advantages[:num_tokens], values, returns, importance)

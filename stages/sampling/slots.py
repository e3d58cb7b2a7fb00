"""The responses in the slots of a decoding batch, stored in tensors that keep their addresses.

S slots, V vocabulary. A slot has one response at a time. When the response has ended, another one takes the slot. No step copies a value
from the device to the CPU, and every tensor keeps its address. So a step can be recorded as a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stages.sampling.choosing import sample_tokens
from stages.sampling.decoding import Decoded, Endings


class Choice(NamedTuple):
    """The settings for choosing tokens; see ``GenerationSettings``."""

    temperature: float
    top_k: int
    top_p: float

    def sample(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sample tokens [B] and their log-probabilities [B] from logits [B, V] and noise [B] (see ``sample_tokens``)."""
        return sample_tokens(logits, noise, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Slots:
    """The state of S responses. ``most``: the most tokens of a response."""

    def __init__(self, number: int, most: int, device: torch.device) -> None:
        self.number, self.most = number, most

        def counters() -> Tensor:
            return torch.zeros(number, dtype=torch.long, device=device)

        self.tokens, self.positions = counters(), counters()  # the token that the model reads next, and its position
        self._counts, self._limits = counters(), counters()  # response tokens so far, and their maximum
        self._running = torch.zeros(number, dtype=torch.bool, device=device)
        # One spare column: a step also writes a token for a finished response, and that token goes after its last one.
        self._noise = torch.zeros((number, most + 1), dtype=torch.float64, device=device)
        self._ids = torch.zeros((number, most + 1), dtype=torch.long, device=device)
        self._logprobs = torch.zeros((number, most + 1), device=device)
        self._anywhere = self._late = torch.zeros(0, dtype=torch.bool, device=device)
        self._stop_after = torch.zeros((), dtype=torch.long, device=device)
        self._stops_at_once = False  # whether late stop tokens already count at the first position

    def set_endings(self, endings: Endings) -> None:
        """Use these stop token tables from now on.

        Raises ValueError if their length differs from that of the first tables, because the tensors would need new addresses.
        """
        if not len(self._anywhere):
            self._anywhere, self._late = endings.anywhere.clone(), endings.late.clone()
        if len(self._anywhere) != len(endings.anywhere):
            raise ValueError(f"{len(endings.anywhere)} logits; the slots were made for {len(self._anywhere)}")
        self._anywhere.copy_(endings.anywhere)
        self._late.copy_(endings.late)
        self._stop_after.fill_(endings.stop_after)
        self._stops_at_once = endings.stop_after == 0

    def admit(self, slots: Tensor, lengths: Tensor, noise: Tensor, logits: Tensor, choice: Choice) -> None:
        """Begin responses in ``slots`` [k] and sample their first tokens.

        ``lengths`` [k]: prompt tokens. ``noise`` [k, maximum response length]: one uniform number per token. ``logits`` [k, V]: the logits
        after each prompt.
        """
        limit = noise.shape[1]
        tokens, chosen = choice.sample(logits, noise[:, 0])
        self._noise[slots, :limit] = noise
        self._ids[slots, 0], self._logprobs[slots, 0] = tokens, chosen
        self.tokens[slots], self.positions[slots] = tokens, lengths
        self._counts[slots], self._limits[slots] = 1, limit
        ends = self._late[tokens] if self._stops_at_once else self._anywhere[tokens]
        self._running[slots] = ~ends & (limit > 1)

    def append(self, logits: Tensor, choice: Choice) -> None:
        """Sample the next token of the first slots from ``logits`` [rows, V]. A finished response does not change."""
        rows = slice(0, len(logits))
        counts, running = self._counts[rows], self._running[rows]
        column = counts[:, None]
        tokens, chosen = choice.sample(logits, self._noise[rows].gather(1, column).squeeze(1))
        self._ids[rows].scatter_(1, column, tokens[:, None])
        self._logprobs[rows].scatter_(1, column, chosen[:, None])
        self.tokens[rows].copy_(tokens)
        ends = torch.where(counts >= self._stop_after, self._late[tokens], self._anywhere[tokens])
        counts += running
        self.positions[rows] += running
        running &= ~ends & (counts < self._limits[rows])

    def running(self) -> list[bool]:
        """Whether the response in each slot is unfinished. On a GPU this call makes the CPU wait."""
        return self._running.tolist()

    def decoded(self, slots: list[int], rows: list[int]) -> Decoded:
        """The finished responses in ``slots``. ``rows``: the row that each of them gets in the result."""
        lengths = self._counts[slots].tolist()
        width = max(lengths)
        return Decoded(rows, self._ids[slots, :width], self._logprobs[slots, :width], lengths)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move the responses in the slots ``sources`` [k] to ``targets`` [k]."""
        for tensor in (*self._volatile(), self._limits, self._noise, self._ids, self._logprobs):
            tensor[targets] = tensor[sources]
        self._running[sources] = False

    def snapshot(self) -> list[Tensor]:
        """A copy of the state that ``append`` changes, without ids and log-probabilities: after ``restore``, ``append`` overwrites them."""
        return [tensor.clone() for tensor in self._volatile()]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Restore the state of ``snapshot``."""
        for tensor, saved in zip(self._volatile(), snapshot, strict=True):
            tensor.copy_(saved)

    def num_bytes(self) -> int:
        """Memory of all tensors, in bytes."""
        tensors = (*self._volatile(), self._limits, self._noise, self._ids, self._logprobs, self._anywhere, self._late)
        return sum(tensor.nbytes for tensor in tensors)

    def _volatile(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self._counts, self._running

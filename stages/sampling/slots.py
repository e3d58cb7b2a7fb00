"""The responses in the slots of a decoding batch: what a decoding step reads and writes, in tensors that stay where they are.

S slots, V vocabulary. A slot holds one response at a time; when it has ended, another takes the slot. No step asks the device for a
number, and every tensor keeps its address, so that a step can be recorded as a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stages.sampling.choosing import sample_tokens
from stages.sampling.decoding import Decoded, Endings


class Choice(NamedTuple):
    """How tokens are chosen; see ``GenerationSettings``."""

    temperature: float
    top_k: int
    top_p: float

    def sample(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probabilities [B] for logits [B, V] and noise [B]."""
        return sample_tokens(logits, noise, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Slots:
    """State of S responses. ``most``: the tokens that a response has room for."""

    def __init__(self, number: int, most: int, device: torch.device) -> None:
        self.number, self.most = number, most

        def counters() -> Tensor:
            return torch.zeros(number, dtype=torch.long, device=device)

        self.tokens, self.positions = counters(), counters()  # the token that the model reads next, and its position
        self._counts, self._limits = counters(), counters()  # tokens of the response so far, and at most
        self._running = torch.zeros(number, dtype=torch.bool, device=device)
        # One column more than any response needs: what is written of a response that has ended goes behind it.
        self._noise = torch.zeros((number, most + 1), dtype=torch.float64, device=device)
        self._ids = torch.zeros((number, most + 1), dtype=torch.long, device=device)
        self._logprobs = torch.zeros((number, most + 1), device=device)
        self._anywhere = self._late = torch.zeros(0, dtype=torch.bool, device=device)
        self._stop_after = torch.zeros((), dtype=torch.long, device=device)
        self._stops_at_once = False  # whether late stop tokens count from the first position on

    def set_endings(self, endings: Endings) -> None:
        """Use these tables from now on. Raises ValueError for another number of tokens than before, as addresses would change."""
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

        lengths [k]: tokens of each prompt; noise [k, tokens at most]: uniform numbers, one per token; logits [k, V]: after each prompt.
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
        """Sample the next token of the first slots from ``logits`` [rows, V]. A response that has ended stays as it is."""
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
        """Whether the response of each slot goes on. On a GPU the CPU waits here."""
        return self._running.tolist()

    def decoded(self, slots: list[int], rows: list[int]) -> Decoded:
        """The responses in ``slots``, which have ended, under the names ``rows``."""
        lengths = self._counts[slots].tolist()
        width = max(lengths)
        return Decoded(rows, self._ids[slots, :width], self._logprobs[slots, :width], lengths)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move the responses in the slots ``sources`` [k] to ``targets`` [k]."""
        for tensor in (*self._volatile(), self._limits, self._noise, self._ids, self._logprobs):
            tensor[targets] = tensor[sources]
        self._running[sources] = False

    def snapshot(self) -> list[Tensor]:
        """A copy of all that ``append`` changes, but for the token that it writes, which a second ``append`` writes again."""
        return [tensor.clone() for tensor in self._volatile()]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Make everything as it was at the ``snapshot``."""
        for tensor, saved in zip(self._volatile(), snapshot, strict=True):
            tensor.copy_(saved)

    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (*self._volatile(), self._limits, self._noise, self._ids, self._logprobs, self._anywhere, self._late)
        return sum(tensor.nbytes for tensor in tensors)

    def _volatile(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self._counts, self._running

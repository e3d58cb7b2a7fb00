"""Decoding one batch token by token. Finished rows leave the batch, and a repeated prompt is read once.

B sequences, P prompt tokens (left padded), R response tokens (right padded), V vocabulary. A step costs one forward pass of the model and
a few operations on [B] tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.config import GenerationSettings
from stages.sampling.choosing import sample_tokens
from stages.sampling.padding import left_pad
from stages.sampling.readers import Reader, make_reader
from stages.sampling.support import DecodingSupport

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

COMPACT_BELOW = 0.75  # finished rows leave the cache when the share of running rows falls below this
CHECK_EVERY = {"cpu": 1, "cuda": 8}
"""By device type: steps between two checks for finished rows. Each check makes the CPU wait for a GPU."""


@dataclass(frozen=True)
class Decoded:
    """k finished responses: their rows, token ids and log-probabilities [k, R] (right padded), and lengths in tokens."""

    rows: list[int]
    ids: Tensor
    logprobs: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class Request:
    """What to sample: one response for each of ``prompts`` (token ids). A row is an index of ``prompts``.

    ``noise`` [prompts, max_new_tokens]: uniform numbers in [0, 1), one for each token that may be sampled. ``stop_ids`` end a response at
    every position, ``late_stop_ids`` from response position ``settings.stop_after`` on.
    """

    prompts: Sequence[Sequence[int]]
    settings: GenerationSettings
    noise: Tensor
    stop_ids: Sequence[int]
    late_stop_ids: Sequence[int]
    pad_token_id: int

    def prompt_batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """The distinct prompts of ``rows``, as ids and mask [prompts, P] (left padded), and the index of each row's prompt in them."""
        distinct: dict[tuple[int, ...], int] = {}
        indices = [distinct.setdefault(tuple(self.prompts[row]), len(distinct)) for row in rows]
        return *left_pad(list(distinct), self.pad_token_id, self.noise.device), indices


@dataclass(frozen=True)
class Endings:
    """Boolean tables of the stop tokens: ``anywhere`` [V] for every position, ``late`` [V] from response position ``stop_after`` on."""

    anywhere: Tensor
    late: Tensor
    stop_after: int

    @classmethod
    def of(cls, request: Request, size: int) -> Endings:
        """Make the tables for ``size`` logits. Ids of ``size`` or more are ignored: the model cannot sample them."""
        anywhere = torch.zeros(size, dtype=torch.bool)
        anywhere[[token for token in request.stop_ids if token < size]] = True
        late = anywhere.clone()
        late[[token for token in request.late_stop_ids if token < size]] = True
        device = request.noise.device
        return cls(anywhere.to(device), late.to(device), request.settings.stop_after)

    def at(self, position: int) -> Tensor:
        """Whether each token [V] ends a response at ``position`` (counted from 0)."""
        return self.late if position >= self.stop_after else self.anywhere


class Responses:
    """The responses of a batch during sampling. When a row leaves the batch, its response stays here."""

    def __init__(self, noise: Tensor, pad_token_id: int) -> None:
        """``noise`` [B, max_new_tokens]: one uniform number for each token that may be sampled."""
        number, most = noise.shape
        self._noise, self._pad = noise, pad_token_id
        self._ids = torch.full((number, most), pad_token_id, dtype=torch.long, device=noise.device)
        self._logprobs = torch.zeros((number, most), device=noise.device)
        self._lengths = torch.zeros(number, dtype=torch.long, device=noise.device)
        self._members = torch.arange(number, device=noise.device)  # row of the batch -> row of the result
        self._running = torch.ones(number, dtype=torch.bool, device=noise.device)  # by row of the batch
        self._unreported = set(range(number))

    def extend(self, logits: Tensor, step: int, settings: GenerationSettings, endings: Endings) -> Tensor:
        """Sample the next token of each row from ``logits`` [rows, V] and append it; returns the tokens [rows]."""
        tokens, chosen = sample_tokens(
            logits,
            self._noise[self._members, step],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        self._ids[self._members, step] = torch.where(self._running, tokens, self._pad)
        self._logprobs[self._members, step] = torch.where(self._running, chosen, 0.0)
        self._lengths[self._members] += self._running
        self._running = self._running & ~endings.at(step)[tokens]
        return tokens

    def num_running(self) -> int:
        """The count of unfinished responses. On a GPU this call makes the CPU wait."""
        return int(self._running.sum())

    def compacted(self, num_running: int) -> Tensor | None:
        """Drop the finished rows if enough rows have finished; returns the row indices that stay, or None if nothing changes."""
        if num_running >= COMPACT_BELOW * len(self._members):
            return None
        kept = torch.nonzero(self._running).squeeze(1)
        self._members = self._members[kept]
        self._running = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        return kept

    def newly_finished(self, *, all_finished: bool = False) -> Decoded | None:
        """Responses that have ended since the last call; with ``all_finished`` all unreported ones. None if there are none."""
        running = set() if all_finished else set(self._members[self._running].tolist())
        rows = sorted(self._unreported - running)
        if not rows:
            return None
        self._unreported -= set(rows)
        lengths = self._lengths[rows].tolist()
        width = max(lengths)
        return Decoded(rows, self._ids[rows, :width], self._logprobs[rows, :width], lengths)


def decode(
    model: TransformersModel, support: DecodingSupport, request: Request, rows: Sequence[int], report: Callable[[Decoded], None]
) -> None:
    """Sample the responses of ``rows`` in one batch. A prompt that several rows share is read once.

    If ``support.hides_padding`` is False, all prompts must have the same length. ``report`` gets every response once, soon after it has
    ended.
    """

    def report_rows(finished: Decoded) -> None:
        report(replace(finished, rows=[rows[row] for row in finished.rows]))

    settings = request.settings
    reader = make_reader(model, support, settings.max_new_tokens)
    logits = _read_prompts(reader, request, rows)
    endings = Endings.of(request, logits.shape[-1])
    responses = Responses(request.noise[rows], request.pad_token_id)
    check_every = CHECK_EVERY.get(logits.device.type, 1)
    num_running = len(rows)
    with reader.stepping():
        for step in range(settings.max_new_tokens):
            tokens = responses.extend(logits, step, settings, endings)
            num_left = settings.max_new_tokens - step - 1
            if num_left and (step + 1) % check_every == 0:
                before, num_running = num_running, responses.num_running()
                if 0 < num_running < before and (finished := responses.newly_finished()) is not None:
                    report_rows(finished)
                if num_running and (kept := responses.compacted(num_running)) is not None:
                    tokens = tokens[kept]
                    reader.keep(kept, trim=True)
            if not num_left or not num_running:
                break
            logits = reader.step(tokens)
    if (finished := responses.newly_finished(all_finished=True)) is not None:
        report_rows(finished)


def _read_prompts(reader: Reader, request: Request, rows: Sequence[int]) -> Tensor:
    """Read every prompt once and give each row its own copy of the cache; returns the logits after each row's prompt [B, V]."""
    prompt_ids, prompt_mask, indices = request.prompt_batch(rows)
    logits = reader.read(prompt_ids, prompt_mask)
    if len(prompt_ids) == len(rows):
        return logits
    copied = torch.tensor(indices, device=logits.device)
    reader.keep(copied, trim=False)
    return logits[copied]

"""Continuous batching: a waiting prompt replaces a finished response, so the batch stays full until no prompt waits.

S slots, P prompt tokens (left padded), V vocabulary. Every response has its own random numbers. So it depends neither on the other
responses in the batch nor on the step at which it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.sampling.cache import PromptLayer, forward_options, layers_of
from stages.sampling.decoding import CHECK_EVERY, Decoded, Endings, Request
from stages.sampling.readers import read_in_parts
from stages.sampling.slots import Choice
from stages.sampling.support import DecodingSupport
from stages.sampling.workspace import Workspace

if TYPE_CHECKING:
    from transformers import DynamicCache

    from stages.model_types import TransformersModel

REFILL_SHARE = 1 / 8  # free slots are filled when they reach this share of all slots, because reading several prompts together is cheaper


@dataclass
class Occupant:
    """The response in a slot.

    ``row``: row of its prompt. ``length``: prompt tokens. ``sampled``: an upper bound on the response tokens sampled so far.
    """

    row: int
    length: int
    sampled: int = 1


class SlotDecoder:
    """Samples responses to prompts in the slots of a workspace."""

    def __init__(self, model: TransformersModel, support: DecodingSupport, workspace: Workspace, request: Request) -> None:
        settings, prompts = request.settings, request.prompts
        self._model, self._support, self._workspace, self._slots = model, support, workspace, workspace.slots
        self._request, self._settings, self._device = request, settings, request.noise.device
        self._refill = settings.continuous_batching is not False  # replace a finished response while others still run
        self._choice = Choice(settings.temperature, settings.top_k, settings.top_p)
        self._options = forward_options(support, workspace.cache)
        self._occupants: dict[int, Occupant] = {}  # by slot
        self._num_slots, self._longest = min(settings.batch_size, len(prompts)), max(map(len, prompts))
        self._has_endings = False
        self._waiting: deque[int] = deque()  # rows of prompts

    def run(self, order: Sequence[int], report: Callable[[Decoded], None]) -> None:
        """Sample a response to each prompt in ``order`` (row indices).

        ``report`` gets each response soon after it has ended, with the row index of its prompt.
        """
        self._waiting.extend(order)
        with self._workspace.in_use(self._model):
            while self._waiting or self._occupants:
                if rows := self._next_rows():
                    self._admit(rows)
                self._step_for_a_while()
                if (finished := self._finished()) is not None:
                    report(finished)
                if not (self._waiting and self._refill):
                    self._compact()

    def _next_rows(self) -> list[int]:
        """Take the rows that begin now out of the queue; returns none while too few slots are free."""
        free = self._num_slots - len(self._occupants)
        enough = min(len(self._waiting), max(1, int(REFILL_SHARE * self._num_slots)))
        if self._occupants and (not self._refill or free < enough):
            return []
        return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _admit(self, rows: list[int]) -> None:
        """Read the prompts ``rows`` into free slots and sample the first token of each response. Equal prompts are read once."""
        free = [slot for slot in range(self._num_slots) if slot not in self._occupants][: len(rows)]
        ids, mask, prompt_rows = self._request.prompt_batch(rows)
        for first, read, logits in read_in_parts(self._model, self._workspace.cache, self._options, ids, mask):
            members = zip(free, rows, (prompt_row - first for prompt_row in prompt_rows), strict=True)
            self._put(read, logits, [member for member in members if 0 <= member[2] < len(logits)])
        for slot, row in zip(free, rows, strict=True):
            self._occupants[slot] = Occupant(row, len(self._request.prompts[row]))

    def _put(self, read: DynamicCache, logits: Tensor, part: list[tuple[int, int, int]]) -> None:
        """Begin responses to prompts that were read in one forward pass; ``read`` is the cache of that pass.

        ``part``: (slot, row of the prompt, row in ``read`` and ``logits``) of each response.
        """
        if not self._has_endings:
            self._slots.set_endings(Endings.of(self._request, logits.shape[-1]))
            self._has_endings = True
        rows = [row for _, row, _ in part]
        slots, sources = (torch.tensor(column, device=self._device) for column in ([p[0] for p in part], [p[2] for p in part]))
        lengths = torch.tensor([len(self._request.prompts[row]) for row in rows], device=self._device)
        for layer, states in zip(self._workspace.layers, layers_of(read, PromptLayer), strict=True):
            if states.keys is not None and states.values is not None:  # a layer that the model does not use is empty
                layer.put(states.keys, states.values, sources, slots, lengths, self._workspace.room)
        self._slots.admit(slots, lengths, self._request.noise[rows], logits[sources], self._choice)

    def _step_for_a_while(self) -> None:
        """Run decoding steps until the next check for finished responses."""
        most = self._settings.max_new_tokens
        left = [most - occupant.sampled for occupant in self._occupants.values()]
        may_end = bool(self._request.stop_ids or self._request.late_stop_ids)
        check_every = CHECK_EVERY.get(self._device.type, 1)
        number = min(check_every, max(left)) if may_end else min(left)
        for _ in range(number):
            occupied = self._occupants.values()
            columns = max(occupant.length + occupant.sampled for occupant in occupied)
            self._workspace.make_room(columns, self._longest + most)
            size = self._workspace.size(max(self._occupants) + 1, columns)
            remaining = most if self._waiting else max(most - occupant.sampled for occupant in occupied)
            self._workspace.step(self._model, self._support, size, self._choice, remaining)
            for occupant in occupied:
                occupant.sampled = min(occupant.sampled + 1, most)

    def _finished(self) -> Decoded | None:
        """Remove the finished responses from their slots and return them; None if there are none."""
        running = self._slots.running()
        ended = [slot for slot in self._occupants if not running[slot]]
        if not ended:
            return None
        return self._slots.decoded(ended, [self._occupants.pop(slot).row for slot in ended])

    def _compact(self) -> None:
        """Move responses to the first slots if that reduces the number of rows per step."""
        if not self._occupants:
            return
        rows = self._workspace.size(len(self._occupants), 1).rows
        sources = [slot for slot in sorted(self._occupants) if slot >= rows]
        if not sources:
            return
        targets = [slot for slot in range(rows) if slot not in self._occupants][: len(sources)]
        moved = torch.tensor(sources, device=self._device), torch.tensor(targets, device=self._device)
        for layer in self._workspace.layers:
            layer.move(*moved)
        self._slots.move(*moved)
        for source, target in zip(sources, targets, strict=True):
            self._occupants[target] = self._occupants.pop(source)

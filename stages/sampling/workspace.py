"""What decoding in slots works with: the slots, their cache, and the recorded steps over both; kept between two calls where that pays.

A kept workspace serves the next call if its recordings still say the truth: the same model with its weights at the same addresses (their
values may have changed), the same adapters, the same precision. One workspace is kept at a time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from stages.sampling.cache import COLUMN_ROOM, SlotWindow, decoding_attention, forward_options, make_slot_cache
from stages.sampling.casts import AutocastCopies, uncached_casts
from stages.sampling.graphs import CudaRecorder, GraphPool, Recorder, Size, can_record, rounded_room
from stages.sampling.slots import Choice, Slots
from stages.sampling.support import DecodingSupport

logger = logging.getLogger(__name__)

EVEN_COLUMNS = 16  # on a GPU, attention kernels want masks of a multiple of this many columns
RESPONSE_ROOM = 512  # tokens of a response that a cache on a GPU has room for at first; its room is doubled when they are used up


class Workspace:
    """Slots, cache and recordings. It holds nothing of the model, so that it does not keep it alive."""

    def __init__(self, model: Any, slots: int, longest: int, most: int, recorder: Recorder | None) -> None:
        """``longest``: tokens of the longest prompt; ``most``: of a response; ``recorder`` None: every step is computed."""
        self._device = next(model.parameters()).device
        self._is_exact = recorder is None and self._device.type == "cpu"
        self.room = longest + 1 if self._is_exact else first_room(longest, most)
        self.slots = Slots(slots, most, self._device)
        self._window = SlotWindow(slots, 1, self.slots.positions)
        self.cache = make_slot_cache(model, self._window, slots)
        self._recorder = recorder
        self.pool = None if recorder is None else GraphPool(recorder, slots, self.room)
        self._copies = AutocastCopies()

    @contextmanager
    def in_use(self, model: Any) -> Iterator[None]:
        """What prompts are read and steps are made in."""
        with self._copies.in_use(model), uncached_casts(self._device.type):
            yield

    def make_room(self, columns: int, limit: int) -> None:
        """Let the cache have at least ``columns``; more than ``limit`` are never needed. It is copied then, and recordings are lost."""
        if columns <= self.room:
            return
        more = columns + max(COLUMN_ROOM, columns // 8) if self._is_exact else rounded_room(2 * columns)
        self.room = max(columns, min(more, limit)) if self._is_exact else min(more, rounded_room(limit))
        for layer in self.cache.layers:
            layer.widen(self.room)
        if self._recorder is not None:
            self.pool = GraphPool(self._recorder, self.slots.number, self.room)

    def size(self, rows: int, columns: int) -> Size:
        """The size to decode ``rows`` and ``columns`` at."""
        if self.pool is not None and self.pool.is_useful:
            return self.pool.size(rows, columns)
        return Size(rows, columns if self._is_exact else min(self.room, -(-columns // EVEN_COLUMNS) * EVEN_COLUMNS))

    def step(self, model: Any, support: DecodingSupport, size: Size, choice: Choice, remaining: int) -> None:
        """Read the last token of the first rows and sample the next; ``remaining``: steps that may follow at most, with this one."""
        options = forward_options(support, self.cache)

        def compute(size: Size) -> Tensor:
            return self._compute(model, options, size, choice)

        with decoding_attention(model, self.cache):
            if self.pool is None:
                compute(size)
            else:
                self.pool.step(size, choice, compute, self.slots, remaining)

    def _compute(self, model: Any, options: dict[str, Any], size: Size, choice: Choice) -> Tensor:
        rows, columns = size
        # A response that has ended may stand behind the columns of this step; it writes to the last of them.
        at = self.slots.positions[:rows].clamp(max=columns - 1)
        self._window.rows, self._window.columns, self._window.at = rows, columns, at
        hidden = torch.arange(columns, device=self._device) > at[:, None]
        bias = torch.zeros((rows, columns), dtype=self._dtype(), device=self._device).masked_fill_(hidden, -torch.inf)
        inputs = {"input_ids": self.slots.tokens[:rows, None], "attention_mask": bias[:, None, None], "position_ids": at[:, None]}
        logits: Tensor = model(**inputs, **options).logits[:, -1]
        self.slots.append(logits, choice)
        return logits

    def _dtype(self) -> torch.dtype:
        """That of keys, which an attention mask has to have as well."""
        return next(layer.dtype for layer in self.cache.layers if layer.is_initialized)

    def serves(self, slots: int, longest: int, most: int) -> bool:
        """Whether a call may use it, and does not hold more than twice the memory that the call may need."""
        has_room = self.slots.number >= slots and self.room >= first_room(longest, most) and self.slots.most >= most
        return has_room and self.slots.number * self.room <= 2 * slots * rounded_room(longest + most)

    def num_bytes(self) -> int:
        """Memory of all that is kept."""
        storages = [storage for layer in self.cache.layers if layer.is_initialized for storage in (layer.keys, layer.values)]
        recorded = 0 if self.pool is None else self.pool.num_bytes
        return sum(storage.nbytes for storage in storages) + self.slots.num_bytes() + self._copies.num_bytes() + recorded


def first_room(longest: int, most: int) -> int:
    """Columns of a new cache on a GPU for prompts of up to ``longest`` tokens and responses of up to ``most``."""
    return rounded_room(longest + min(most, RESPONSE_ROOM))


@dataclass(frozen=True)
class _Kept:
    model: weakref.ref[Any]
    signature: Hashable
    workspace: Workspace


_kept: _Kept | None = None


@contextmanager
def workspace_for(model: Any, slots: int, longest: int, most: int, *, cuda_graphs: bool) -> Iterator[Workspace]:
    """A workspace for ``slots``, prompts of up to ``longest`` tokens, and responses of up to ``most``.

    With recordings it is the kept one if that serves; afterwards it is kept if its memory allows.
    """
    recorder = make_recorder(model) if cuda_graphs else None
    if recorder is None:
        yield Workspace(model, slots, longest, most, None)
        return
    signature = weights_signature(model)
    workspace = _taken(model, signature, slots, longest, most) or Workspace(model, slots, longest, most, recorder)
    yield workspace
    _keep(model, signature, workspace, recorder.memory_limit)


def make_recorder(model: Any) -> Recorder | None:
    """What records the steps of ``model``; None where nothing can."""
    return CudaRecorder(next(model.parameters()).device) if can_record(model) else None


def drop_kept_workspace() -> None:
    """Free the memory of the kept workspace; the next call records anew."""
    global _kept
    _kept = None


def _taken(model: Any, signature: Hashable, slots: int, longest: int, most: int) -> Workspace | None:
    """The kept workspace if it serves. It is no longer kept in any case: two at a time would take too much memory."""
    kept = _kept
    drop_kept_workspace()
    if kept is None or kept.model() is not model or kept.signature != signature or not kept.workspace.serves(slots, longest, most):
        return None
    return kept.workspace


def _keep(model: Any, signature: Hashable, workspace: Workspace, memory_limit: int) -> None:
    global _kept
    if workspace.pool is None or not len(workspace.pool):
        return
    num_bytes = workspace.num_bytes()
    if num_bytes <= memory_limit:
        _kept = _Kept(weakref.ref(model), signature, workspace)
    else:
        logger.info(
            "%d recorded decoding steps and their cache take %d MiB, more than the %d MiB that may stay allocated; they are recorded anew",
            len(workspace.pool),
            num_bytes >> 20,
            memory_limit >> 20,
        )


def weights_signature(model: Any) -> Hashable:
    """What a recorded step takes for granted of ``model``: where its weights are, which adapters act and how, and the precision."""
    weights = tuple((tensor.data_ptr(), tensor.dtype) for tensor in chain(model.parameters(), model.buffers()))
    adapters = tuple(_adapter_state(module) for module in model.modules() if hasattr(module, "_active_adapter"))
    kind = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return weights, adapters, autocast, model.config._attn_implementation


def _adapter_state(module: Any) -> Hashable:
    """Of a layer of peft: its adapters that act, in order, the scale of each, and those that are merged into the weights."""
    active = module._active_adapter
    scaling = getattr(module, "scaling", {})
    return (
        tuple([active] if isinstance(active, str) else active),
        bool(getattr(module, "_disable_adapters", False)),
        tuple(getattr(module, "merged_adapters", ())),
        tuple(sorted(scaling.items())) if isinstance(scaling, dict) else (),
    )

"""The workspace for decoding in slots: the slots, their KV cache, and the recorded CUDA graphs. It can be kept between two calls.

A kept workspace is reused if its recordings are still valid. They need the same model with its weights at the same addresses (the
values may have changed), the same adapters and the same precision. At most one workspace is kept.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from stages.sampling.cache import COLUMN_ROOM, SlotLayer, SlotWindow, decoding_attention, forward_options, layers_of, make_slot_cache
from stages.sampling.casts import AutocastCopies, uncached_casts
from stages.sampling.graphs import CudaRecorder, GraphPool, Recorder, Size, can_record, rounded_room
from stages.sampling.slots import Choice, Slots
from stages.sampling.support import DecodingSupport

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)

EVEN_COLUMNS = 16  # on a GPU, attention kernels need a mask width that is a multiple of this
RESPONSE_ROOM = 512  # initial capacity of a cache on a GPU, in response tokens; the capacity doubles when it is full


class Workspace:
    """Slots, cache and recordings. It has no reference to the model, so it does not keep the model in memory."""

    def __init__(self, model: TransformersModel, slots: int, longest: int, most: int, recorder: Recorder | None) -> None:
        """``longest``: tokens of the longest prompt; ``most``: most tokens of a response; ``recorder`` None: no CUDA graphs."""
        self._device = next(model.parameters()).device
        self._is_exact = recorder is None and self._device.type == "cpu"
        self.room = longest + 1 if self._is_exact else first_room(longest, most)
        self.slots = Slots(slots, most, self._device)
        self._window = SlotWindow(slots, 1, self.slots.positions)
        self.cache = make_slot_cache(model, self._window, slots)
        self.layers = layers_of(self.cache, SlotLayer)
        self._recorder = recorder
        self.pool = None if recorder is None else GraphPool(recorder, slots, self.room)
        self._copies = AutocastCopies()

    @contextmanager
    def in_use(self, model: TransformersModel) -> Iterator[None]:
        """The context in which prompts must be read and steps must run."""
        with self._copies.in_use(model), uncached_casts(self._device.type):
            yield

    def make_room(self, columns: int, limit: int) -> None:
        """Grow the cache to at least ``columns`` columns; ``limit`` is the most that will ever be needed.

        Growing copies the cache and discards all recordings.
        """
        if columns <= self.room:
            return
        more = columns + max(COLUMN_ROOM, columns // 8) if self._is_exact else rounded_room(2 * columns)
        self.room = max(columns, min(more, limit)) if self._is_exact else min(more, rounded_room(limit))
        for layer in self.layers:
            layer.widen(self.room)
        if self._recorder is not None:
            self.pool = GraphPool(self._recorder, self.slots.number, self.room)

    def size(self, rows: int, columns: int) -> Size:
        """The size of a step that decodes ``rows`` rows over ``columns`` columns, rounded up where that helps."""
        if self.pool is not None and self.pool.is_useful:
            return self.pool.size(rows, columns)
        return Size(rows, columns if self._is_exact else min(self.room, -(-columns // EVEN_COLUMNS) * EVEN_COLUMNS))

    def step(self, model: TransformersModel, support: DecodingSupport, size: Size, choice: Choice, remaining: int) -> None:
        """Read the last token of the first rows and sample the next one.

        ``remaining``: the most steps that are left, including this one.
        """
        options = forward_options(support, self.cache)

        def compute(size: Size) -> Tensor:
            return self._compute(model, options, size, choice)

        with decoding_attention(model, self.cache):
            if self.pool is None:
                compute(size)
            else:
                self.pool.step(size, choice, compute, self.slots, remaining)

    def _compute(self, model: TransformersModel, options: dict[str, object], size: Size, choice: Choice) -> Tensor:
        rows, columns = size
        # The position of a finished response may be beyond the columns of this step; then it writes to the last column.
        at = self.slots.positions[:rows].clamp(max=columns - 1)
        self._window.rows, self._window.columns, self._window.at = rows, columns, at
        hidden = torch.arange(columns, device=self._device) > at[:, None]
        bias = torch.zeros((rows, columns), dtype=self._dtype(), device=self._device).masked_fill_(hidden, -torch.inf)
        inputs = {"input_ids": self.slots.tokens[:rows, None], "attention_mask": bias[:, None, None], "position_ids": at[:, None]}
        logits: Tensor = model(**inputs, **options).logits[:, -1]
        self.slots.append(logits, choice)
        return logits

    def _dtype(self) -> torch.dtype:
        """The dtype of the cached keys. The attention mask must have the same dtype."""
        return next(layer.keys.dtype for layer in self.layers if layer.keys is not None)

    def serves(self, slots: int, longest: int, most: int) -> bool:
        """Whether a call can use this workspace: it is large enough, and not more than twice as large as the call needs."""
        has_room = self.slots.number >= slots and self.room >= first_room(longest, most) and self.slots.most >= most
        return has_room and self.slots.number * self.room <= 2 * slots * rounded_room(longest + most)

    def num_bytes(self) -> int:
        """Memory of the cache, the slots, the weight copies and the recordings, in bytes."""
        storages = [storage for layer in self.layers for storage in (layer.keys, layer.values) if storage is not None]
        recorded = 0 if self.pool is None else self.pool.num_bytes
        return sum(storage.nbytes for storage in storages) + self.slots.num_bytes() + self._copies.num_bytes() + recorded


def first_room(longest: int, most: int) -> int:
    """Columns of a new cache on a GPU for prompts of up to ``longest`` tokens and responses of up to ``most`` tokens."""
    return rounded_room(longest + min(most, RESPONSE_ROOM))


@dataclass(frozen=True)
class _Kept:
    model: weakref.ref[TransformersModel]
    signature: Hashable
    workspace: Workspace


_kept: _Kept | None = None


@contextmanager
def workspace_for(model: TransformersModel, slots: int, longest: int, most: int, *, cuda_graphs: bool) -> Iterator[Workspace]:
    """A workspace for ``slots`` slots, prompts of up to ``longest`` tokens, and responses of up to ``most`` tokens.

    With CUDA graphs, the kept workspace is reused if it is suitable. At the end the workspace is kept if it is within the memory limit.
    """
    recorder = make_recorder(model) if cuda_graphs else None
    if recorder is None:
        yield Workspace(model, slots, longest, most, None)
        return
    signature = weights_signature(model)
    workspace = _taken(model, signature, slots, longest, most) or Workspace(model, slots, longest, most, recorder)
    yield workspace
    _keep(model, signature, workspace, recorder.memory_limit)


def make_recorder(model: TransformersModel) -> Recorder | None:
    """A recorder for the steps of ``model``; None if they cannot be recorded."""
    return CudaRecorder(next(model.parameters()).device) if can_record(model) else None


def drop_kept_workspace() -> None:
    """Free the memory of the kept workspace. The next call records its steps again."""
    global _kept
    _kept = None


def _taken(model: TransformersModel, signature: Hashable, slots: int, longest: int, most: int) -> Workspace | None:
    """The kept workspace if it is suitable, else None. In both cases it is no longer kept, because two would need too much memory."""
    kept = _kept
    drop_kept_workspace()
    if kept is None or kept.model() is not model or kept.signature != signature or not kept.workspace.serves(slots, longest, most):
        return None
    return kept.workspace


def _keep(model: TransformersModel, signature: Hashable, workspace: Workspace, memory_limit: int) -> None:
    global _kept
    if workspace.pool is None or not len(workspace.pool):
        return
    num_bytes = workspace.num_bytes()
    if num_bytes <= memory_limit:
        _kept = _Kept(weakref.ref(model), signature, workspace)
    else:
        logger.info(
            "%d recorded decoding steps and their cache take %d MiB, more than the %d MiB that may stay allocated; they are recorded "
            "again for every call",
            len(workspace.pool),
            num_bytes >> 20,
            memory_limit >> 20,
        )


def weights_signature(model: TransformersModel) -> Hashable:
    """The properties of ``model`` that a recording depends on: addresses of weights, state of adapters, precision, attention function."""
    weights = tuple((tensor.data_ptr(), tensor.dtype) for tensor in chain(model.parameters(), model.buffers()))
    adapters = tuple(_adapter_state(cast("BaseTunerLayer", module)) for module in model.modules() if hasattr(module, "_active_adapter"))
    kind = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return weights, adapters, autocast, model.config._attn_implementation


def _adapter_state(module: BaseTunerLayer) -> Hashable:
    """State of a peft layer: active adapters in order, whether adapters are disabled, merged adapters, and the scale of each."""
    active = module._active_adapter
    scaling = getattr(module, "scaling", {})
    return (
        tuple([active] if isinstance(active, str) else active),
        bool(getattr(module, "_disable_adapters", False)),
        tuple(getattr(module, "merged_adapters", ())),
        tuple(sorted(scaling.items())) if isinstance(scaling, dict) else (),
    )

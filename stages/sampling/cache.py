"""KV caches that are written in place, whose rows can be removed or replaced, and the attention of one new token over them.

B sequences, S slots (see ``SlotLayer``), H key-value heads, T tokens so far (including padding), D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.sampling.support import DecodingSupport

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

FIRST_ROOM = 64  # initial capacity of a RoomyLayer, in response tokens; the capacity doubles when it is full
COLUMN_ROOM = 24  # initial capacity of a ColumnLayer, in new tokens; also the minimum by which it grows
Layer = TypeVar("Layer")
BY_COLUMNS = "stages_by_columns"  # the name of ``attend_by_columns`` in transformers' registry of attention functions


def stored_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which a cache keeps keys or values ``states``: autocast's if it is enabled, else their own.

    Rotary positions make fp32 keys under autocast. Attention casts them in every step, so casting them once gives the same bits with half
    of the memory.
    """
    kind = states.device.type
    is_cast = states.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else states.dtype


class PromptLayer(DynamicLayer):
    """Keys and values of prompts that are read in one forward pass. It keeps the model's tensors without copying them."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return key_states, value_states


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in storage [B, H, room, D]. The first ``length`` tokens are in use.

    transformers' own layer copies all keys and values at every step to append one token. This layer writes the token in place.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.room, self.length = room, 0

    def put(self, keys: Tensor, values: Tensor, row: int, rows: int, length: int) -> None:
        """Store keys and values of prompts [b, H, p, D] in the rows from ``row`` on, of ``rows`` rows in total.

        They become the last p of ``length`` tokens; the tokens before them are padding.
        """
        if self.keys is None:
            self.keys, self.values = (self._storage(states, rows, length + self.room) for states in (keys, values))
            self.length, self.device, self.is_initialized = length, keys.device, True
        for storage, states in ((self.keys, keys), (self.values, values)):
            assert storage is not None
            target = self._by_token(storage)[row : row + len(states), :, :length]
            target[:, :, length - states.shape[2] :] = states
            target[:, :, : length - states.shape[2]] = 0.0  # padding has attention weight 0, and 0 times a finite value is 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append [B, H, q, D]; returns all keys and values [B, H, T, D]."""
        assert self.keys is not None and self.values is not None
        start, end = self.length, self.length + key_states.shape[-2]
        self._make_room(end)
        keys, values = self._by_token(self.keys), self._by_token(self.values)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    @property
    def room_in_all(self) -> int:
        """The capacity of the storage, in tokens."""
        assert self.keys is not None
        return self._by_token(self.keys).shape[2]

    def keep(self, rows: Tensor, first: int) -> None:
        """Keep only ``rows`` (indices, which may repeat), and drop the tokens before column ``first``."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (self._from_token(storage, first).index_select(0, rows) for storage in (self.keys, self.values))
        self.length -= first

    def get_seq_length(self) -> int:
        return self.length

    def _make_room(self, tokens: int) -> None:
        assert self.keys is not None and self.values is not None
        if tokens > self.room_in_all:
            self.keys, self.values = (self._widened(old, tokens + self._growth()) for old in (self.keys, self.values))

    def _widened(self, old: Tensor, width: int) -> Tensor:
        """A new storage for ``width`` tokens that begins with the tokens of ``old``."""
        states = self._by_token(old)[:, :, : self.length]
        made = self._storage(states, len(states), width)
        self._by_token(made)[:, :, : self.length] = states
        return made

    def _growth(self) -> int:
        return max(self.room, self.length)

    def _storage(self, states: Tensor, rows: int, width: int) -> Tensor:
        """An empty storage for ``rows`` sequences of ``width`` tokens, with the heads of ``states`` [b, H, q, D]."""
        return states.new_empty((rows, states.shape[1], width, states.shape[3]), dtype=stored_dtype(states))

    def _by_token(self, storage: Tensor) -> Tensor:
        """A view of the storage as [B, H, room, D]."""
        return storage

    def _from_token(self, storage: Tensor, first: int) -> Tensor:
        return storage[:, :, first:]


class ColumnLayer(RoomyLayer):
    """A ``RoomyLayer`` with storage [B, H, D, room]: each token is a column.

    A CPU's prefetcher works best on one contiguous stream. With storage [B, H, room, D], the unused capacity leaves a gap of kilobytes
    after every head: attention over 29 MiB then takes twice as long as without gaps (measured on a Zen 5). With columns a gap is two cache
    lines, which the prefetcher skips, or at most an eighth of the data that is read.
    """

    def _growth(self) -> int:
        return max(self.room, self.length // 8)  # a long cache grows by an eighth

    def _storage(self, states: Tensor, rows: int, width: int) -> Tensor:
        return states.new_empty((rows, states.shape[1], states.shape[3], width), dtype=stored_dtype(states))

    def _by_token(self, storage: Tensor) -> Tensor:
        return storage.transpose(-1, -2)

    def _from_token(self, storage: Tensor, first: int) -> Tensor:
        return storage[..., first:]


@dataclass
class SlotWindow:
    """The part of a cache with slots that a decoding step uses: the first ``rows`` slots and their first ``columns`` tokens.

    ``at`` [rows]: the column to which each row's new token is written.
    """

    rows: int
    columns: int
    at: Tensor


class SlotLayer(DynamicLayer):
    """Keys and values of one layer in S slots [S, H, room, D]. A slot has one sequence; its token at position p is in column p.

    To give a slot to another sequence, the cache overwrites it. All rows and all steps use the same storage, and ``window`` selects a part
    of it. So CUDA graphs of several sizes can share the storage.
    """

    def __init__(self, window: SlotWindow, slots: int, *, by_columns: bool) -> None:
        """``by_columns``: use storage [S, H, D, room], which a CPU reads faster (see ``ColumnLayer``)."""
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.window, self.slots, self.by_columns = window, slots, by_columns

    def put(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, lengths: Tensor, room: int) -> None:
        """Copy the rows ``rows`` [k] of keys and values [b, H, P, D] (left padded) into ``slots`` [k].

        ``lengths`` [k]: tokens of each row without padding. ``room``: capacity in tokens, if the storage must be created.
        """
        if self.keys is None or self.values is None:
            self.keys, self.values = self._storage(keys, room), self._storage(values, room)
            self.device, self.dtype, self.is_initialized = keys.device, self.keys.dtype, True
        width = keys.shape[2]
        # Shift each row to the left, over its padding. Copies of its last token fill the end; the attention mask hides them.
        source_columns = (torch.arange(width, device=keys.device) + (width - lengths)[:, None]).clamp(max=width - 1)[:, None, :, None]
        for storage, states in ((self.keys, keys), (self.values, values)):
            assert storage is not None
            states = states.index_select(0, rows)
            moved = states.gather(2, source_columns.expand(-1, states.shape[1], -1, states.shape[3]))
            self._by_token(storage)[:, :, :width].index_copy_(0, slots, moved.to(storage.dtype))

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write one token per row [rows, H, 1, D]; returns the keys and values of the window [rows, H, columns, D]."""
        assert self.keys is not None and self.values is not None
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the sequences in the slots ``sources`` [k] to ``targets`` [k]."""
        for storage in (self.keys, self.values):
            if storage is not None:
                storage.index_copy_(0, targets, storage.index_select(0, sources))

    def get_seq_length(self) -> int:
        """Tokens in the window before the new token."""
        return self.window.columns - 1

    def _written(self, storage: Tensor, states: Tensor) -> Tensor:
        part = self._by_token(storage)[: self.window.rows, :, : self.window.columns]
        return part.scatter_(2, self.window.at[:, None, None, None].expand_as(states), states.to(storage.dtype))

    def widen(self, room: int) -> None:
        """Copy the storage into a larger one with a capacity of ``room`` tokens per slot."""
        if self.keys is not None and self.values is not None:
            self.keys = self._widened(self.keys, room)
            self.values = self._widened(self.values, room)

    def _widened(self, old: Tensor, room: int) -> Tensor:
        tokens = self._by_token(old)
        made = self._storage(tokens, room)
        self._by_token(made)[:, :, : tokens.shape[2]] = tokens
        return made

    def _storage(self, states: Tensor, room: int) -> Tensor:
        """A storage of zeros. Attention reads unwritten columns with weight 0, so they must hold finite values."""
        heads, width = states.shape[1], states.shape[3]
        shape = (self.slots, heads, width, room) if self.by_columns else (self.slots, heads, room, width)
        return states.new_zeros(shape, dtype=stored_dtype(states))

    def _by_token(self, storage: Tensor) -> Tensor:
        """A view of the storage as [S, H, room, D]."""
        return storage.transpose(-1, -2) if self.by_columns else storage


def attend_by_columns(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token as two matrix products, which accept keys and values in any memory layout.

    Calls with other inputs (several new tokens, dropout, a mask per head, softcap) go to transformers' sdpa function.

    query [B, heads, 1, D], key and value [B, H, T, D], additive attention_mask [B, 1, 1, T]; returns ([B, 1, heads, D], None).
    """
    batch, heads, length, width = query.shape
    is_added = attention_mask is None or (attention_mask.is_floating_point() and attention_mask.shape[1] == 1)
    if length != 1 or dropout or not is_added or options.get("position_bias") is not None or options.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    groups = key.shape[1]  # query heads that share a key-value head are the rows of one matrix product
    query = query.reshape(batch, groups, heads // groups, width) * (width**-0.5 if scaling is None else scaling)
    scores = query @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores += attention_mask
    return (scores.softmax(dim=-1) @ value).reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(BY_COLUMNS, attend_by_columns)
AttentionMaskInterface.register(BY_COLUMNS, sdpa_mask)


def layers_of(cache: DynamicCache, kind: type[Layer]) -> list[Layer]:
    """The layers of a cache from this module. All of them are of the class ``kind``."""
    return [layer for layer in cache.layers if isinstance(layer, kind)]


def make_cache(model: TransformersModel, most: int) -> DynamicCache:
    """An empty cache for up to ``most`` new tokens of ``model``, whose attention layers must have no sliding window.

    Prompts are added in parts (``prompt_cache``, ``put_prompts``).
    """
    cache = DynamicCache(config=model.config)
    made, room = (ColumnLayer, COLUMN_ROOM) if reads_by_columns(model) else (RoomyLayer, FIRST_ROOM)
    cache.layers = [made(min(most, room)) for _ in cache.layers]
    return cache


def make_slot_cache(model: TransformersModel, window: SlotWindow, slots: int) -> DynamicCache:
    """An empty cache for ``model`` with ``slots`` slots. Its layers apply no sliding window."""
    cache = DynamicCache(config=model.config)
    cache.layers = [SlotLayer(window, slots, by_columns=reads_by_columns(model)) for _ in cache.layers]
    return cache


def reads_by_columns(model: TransformersModel) -> bool:
    """Whether ``attend_by_columns`` is the fastest attention for this model: in fp32 on a CPU, if the model uses sdpa."""
    weight = next(model.parameters())
    return weight.device.type == "cpu" and model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"


def prompt_cache(cache: DynamicCache) -> DynamicCache:
    """An empty cache for one forward pass over some prompts. ``put_prompts`` then copies its keys and values into ``cache``."""
    made = DynamicCache()
    made.layers = [PromptLayer() for _ in cache.layers]
    return made


def put_prompts(cache: DynamicCache, read: DynamicCache, row: int, rows: int, length: int) -> None:
    """Copy keys and values of prompts from ``read`` (a filled ``prompt_cache``) into ``cache``.

    They go to the rows from ``row`` on, of ``rows`` rows in total, as the last of ``length`` tokens.
    """
    for layer, part in zip(layers_of(cache, RoomyLayer), layers_of(read, PromptLayer), strict=True):
        if part.keys is not None and part.values is not None:  # a layer that the model does not use is empty
            layer.put(part.keys, part.values, row, rows, length)


@contextmanager
def decoding_attention(model: TransformersModel, cache: DynamicCache) -> Iterator[None]:
    """Inside this context ``model`` uses ``attend_by_columns``, if ``cache`` stores tokens as columns."""
    usual = model.config._attn_implementation
    if any(isinstance(layer, ColumnLayer) or getattr(layer, "by_columns", False) for layer in cache.layers):
        model.config._attn_implementation = BY_COLUMNS
    try:
        yield
    finally:
        model.config._attn_implementation = usual


@contextmanager
def without_cudnn_attention(device_type: str) -> Iterator[None]:
    """Context manager without cuDNN's attention on a GPU. It plans for every new shape, and prompts have new shapes all the time.

    Steps of the program disable it for their process. This is for callers of ``generate`` in other programs.
    """
    was_enabled = device_type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if was_enabled:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if was_enabled:
            torch.backends.cuda.enable_cudnn_sdp(True)


def forward_options(support: DecodingSupport, cache: DynamicCache | None) -> dict[str, object]:
    """Keyword arguments of a forward pass: to use ``cache`` (None: no cache), and to compute only the last token's logits."""
    options: dict[str, object] = {"use_cache": cache is not None} if support.takes_use_cache else {}
    if cache is not None and support.cache_name is not None:
        options[support.cache_name] = cache
    return {**options, "logits_to_keep": 1} if support.limits_logits else options


def keep_rows(cache: DynamicCache, rows: Tensor, first: int) -> None:
    """Keep only ``rows`` (indices, which may repeat) in every layer of a cache from ``make_cache``; drop the tokens before ``first``."""
    for layer in layers_of(cache, RoomyLayer):
        if layer.is_initialized:
            layer.keep(rows, first)

"""Three readers, which feed prompts and then one token per row to a model. Each model gets the fastest correct one.

B rows, P prompt tokens (left padded), T tokens so far (including padding), V vocabulary. A reader keeps the state of the text so far, such
as the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from stages.kernels.token_budget import PROMPT_TOKENS, token_budget_batches
from stages.sampling.cache import decoding_attention, forward_options, keep_rows, make_cache, prompt_cache, put_prompts
from stages.sampling.support import DecodingSupport

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


class Reader(Protocol):
    """Reads all prompts once, and then one token per row at each step."""

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts, ids and mask both [prompts, P]; returns the logits after each prompt [prompts, V]."""

    def stepping(self) -> AbstractContextManager[None]:
        """The context in which ``step`` must be called."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens`` [B], one per row; returns the logits after them [B, V]."""

    def keep(self, rows: Tensor, *, trim: bool) -> None:
        """Keep only ``rows`` (indices, which may repeat). ``trim``: a reader may drop columns that are padding in all of them."""


def make_reader(model: TransformersModel, support: DecodingSupport, most: int) -> Reader:
    """The fastest correct reader for ``model``. ``most``: the most tokens after each prompt."""
    if support.adds_mask:
        return InPlaceReader(model, support, most)
    if support.cache_name is not None:
        return CacheReader(model, support, most)
    return FullTextReader(model, support)


def position_ids(mask: Tensor) -> Tensor:
    """Position ids [B, T] for a mask [B, T]. They count real tokens only, so left padding does not shift the positions."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def read_in_parts(
    model: TransformersModel, cache: DynamicCache, options: dict[str, object], ids: Tensor, mask: Tensor
) -> Iterator[tuple[int, DynamicCache, Tensor]]:
    """Read prompts [prompts, P] in parts; yields (row of the part's first prompt, ``prompt_cache`` of the part, last logits [part, V]).

    Neighbouring prompts are read together if they fit into one forward pass. Padding columns that all of them share are left out;
    ``generate`` sorts prompts by length. ``options``: keyword arguments of a forward pass with ``cache``. ``cache`` itself is not changed.
    """
    positions, lengths, width = position_ids(mask), mask.sum(dim=1).tolist(), ids.shape[1]
    most_rows = max(1, PROMPT_TOKENS // width)
    for rows in token_budget_batches(range(len(ids)), lengths, rows=most_rows, device_type=ids.device.type):
        part = (slice(rows[0], rows[-1] + 1), slice(width - max(lengths[row] for row in rows), width))
        read = prompt_cache(cache)
        own = {**options, **{name: read for name, value in options.items() if value is cache}}
        output = model(input_ids=ids[part], attention_mask=mask[part].long(), position_ids=positions[part], **own)
        yield rows[0], read, output.logits[:, -1]


class InPlaceReader:
    """A reader for models that accept an additive attention mask. It writes the cache in place and does not rebuild the mask per step."""

    def __init__(self, model: TransformersModel, support: DecodingSupport, most: int) -> None:
        self._model, self._most = model, most
        self._cache = make_cache(model, most)
        self._options = forward_options(support, self._cache)
        self._positions = self._columns = torch.empty(0)
        self._bias: Tensor | None = None
        self._width = 0

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        number, self._width = ids.shape
        logits = []
        for first, read, made in read_in_parts(self._model, self._cache, self._options, ids, mask):
            put_prompts(self._cache, read, first, number, self._width)
            logits.append(made)
        self._positions = mask.long().sum(dim=1, keepdim=True)
        self._columns = torch.nn.functional.pad(mask, (0, self._most), value=True)  # cache columns that are not padding, for all steps
        self._bias = _attention_bias(self._columns, logits[0].dtype)
        return torch.cat(logits)

    def stepping(self) -> AbstractContextManager[None]:
        return decoding_attention(self._model, self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        self._width += 1
        bias = None if self._bias is None else self._bias[..., : self._width]
        inputs = {"input_ids": tokens[:, None], "attention_mask": bias, "position_ids": self._positions}
        logits = self._model(**inputs, **self._options).logits[:, -1]
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Tensor, *, trim: bool) -> None:
        first = int(self._columns[rows].long().argmax(dim=1).min()) if trim else 0
        self._positions, self._columns = self._positions[rows], self._columns[rows][:, first:]
        self._width -= first
        if self._bias is not None:
            self._bias = _attention_bias(self._columns, self._bias.dtype)
        keep_rows(self._cache, rows, first)


class CacheReader:
    """A reader for all other models with a cache. It uses transformers' cache.

    The model gets a 2-D mask if it can hide padding. Otherwise it gets none, and all rows of a batch must have the same length.
    """

    def __init__(self, model: TransformersModel, support: DecodingSupport, most: int) -> None:
        self._model, self._support, self._most = model, support, most
        self._cache = DynamicCache(config=model.config)
        self._options = forward_options(support, self._cache)
        self._positions = self._columns = torch.empty(0)
        self._width = 0

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._width = ids.shape[1]
        self._columns = torch.nn.functional.pad(mask.long(), (0, self._most), value=1)
        self._positions = mask.long().sum(dim=1, keepdim=True)
        return self._forward(ids, position_ids(mask), masked=True)

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, tokens: Tensor) -> Tensor:
        self._width += 1
        logits = self._forward(tokens[:, None], self._positions, masked=self._support.masks_steps)
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Tensor, *, trim: bool) -> None:
        self._positions, self._columns = self._positions[rows], self._columns[rows]
        self._cache.reorder_cache(cast(torch.LongTensor, rows))

    def _forward(self, ids: Tensor, positions: Tensor, *, masked: bool) -> Tensor:
        """Logits after the last column [B, V]. If the model cannot hide padding, it makes its own mask and positions."""
        inputs = {"input_ids": ids}
        if self._support.hides_padding and masked:
            inputs["attention_mask"] = self._columns[:, : self._width]
        if self._support.hides_padding and self._support.takes_positions:
            inputs["position_ids"] = positions
        return self._model(**inputs, **self._options).logits[:, -1]


class FullTextReader:
    """A reader for models without a cache. Every step reads the full text again. All rows of a batch must have the same length."""

    def __init__(self, model: TransformersModel, support: DecodingSupport) -> None:
        self._model, self._options = model, forward_options(support, None)
        self._ids = torch.empty(0)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._ids = ids
        return self._model(input_ids=ids, **self._options).logits[:, -1]

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        return self._model(input_ids=self._ids, **self._options).logits[:, -1]

    def keep(self, rows: Tensor, *, trim: bool) -> None:
        self._ids = self._ids[rows]


def _attention_bias(columns: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive attention mask of a new token [B, 1, 1, columns]; None if no column is padding.

    It is not boolean, because every layer would then convert it again.
    """
    if bool(columns.all()):
        return None
    return torch.zeros(columns.shape, dtype=dtype, device=columns.device).masked_fill_(~columns, -torch.inf)[:, None, None]

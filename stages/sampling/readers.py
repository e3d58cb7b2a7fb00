"""How a model reads prompts and then one more token of every row: three ways, of which each model gets the fastest that is right for it.

B rows, P prompt tokens (left padded), T tokens so far (padding among them), V vocabulary. A reader keeps what it needs of the text so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from stages.kernels.token_budget import token_budget_batches
from stages.sampling.cache import decoding_attention, forward_options, keep_rows, make_cache, prompt_cache, put_prompts
from stages.sampling.support import DecodingSupport

PROMPT_TOKENS = 16_384  # of one pass over prompts: fills a GPU, and bounds its activations


class Reader(Protocol):
    """Reads prompts once, then one token of every row at a time."""

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts [prompts, P]; returns the logits of the token after each [prompts, V]."""

    def stepping(self) -> AbstractContextManager[None]:
        """What the steps run in."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens`` [B], one for each row; returns the logits of the tokens after them [B, V]."""

    def keep(self, rows: Tensor, *, trim: bool) -> None:
        """Keep only ``rows`` (indices, which may repeat). ``trim``: drop the columns that are padding for all of them, where that pays."""


def make_reader(model: Any, support: DecodingSupport, most: int) -> Reader:
    """The fastest reader that is right for ``model``; ``most`` tokens follow each prompt at most."""
    if support.adds_mask:
        return InPlaceReader(model, support, most)
    if support.cache_name is not None:
        return CacheReader(model, support, most)
    return WholeReader(model, support)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: what makes left padding invisible to the model. Mask [B, T]; returns [B, T]."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def read_in_parts(model: Any, cache: Any, options: dict[str, Any], ids: Tensor, mask: Tensor) -> Iterator[tuple[int, Any, Tensor]]:
    """Read prompts [prompts, P] in parts: (row of the first prompt of a part, a ``prompt_cache`` of the part, its last logits [part, V]).

    Neighbours are read together as long as they fit into one pass, without the padding that all of them have: ``generate`` gives prompts
    in order of length. ``options``: of a forward pass with ``cache``, which stays as it is.
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
    """For models that add a given mask to their attention scores: a cache that is written in place, and masks that are made once."""

    def __init__(self, model: Any, support: DecodingSupport, most: int) -> None:
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
        self._columns = torch.nn.functional.pad(mask, (0, self._most), value=True)  # which columns of the cache count, at any step
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
    """For all other models with a cache: transformers' own, with a 2-D mask, or without one where every row of a batch has one length."""

    def __init__(self, model: Any, support: DecodingSupport, most: int) -> None:
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
        """Logits after the last column [B, V]. Without padding the model makes mask and positions itself, as it is used to."""
        inputs = {"input_ids": ids}
        if self._support.hides_padding and masked:
            inputs["attention_mask"] = self._columns[:, : self._width]
        if self._support.hides_padding and self._support.takes_positions:
            inputs["position_ids"] = positions
        return self._model(**inputs, **self._options).logits[:, -1]


class WholeReader:
    """For models without a cache: every step reads the whole text again. All rows of a batch have one length."""

    def __init__(self, model: Any, support: DecodingSupport) -> None:
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
    """What is added to a new token's attention scores [B, 1, 1, columns]; None where no column is padding.

    Numbers, since every layer would otherwise make numbers of truth values again.
    """
    if bool(columns.all()):
        return None
    return torch.zeros(columns.shape, dtype=dtype, device=columns.device).masked_fill_(~columns, -torch.inf)[:, None, None]

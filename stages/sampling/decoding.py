"""Decoding one batch token by token: a cache that is written in place, rows that leave once they have ended, one prefill per prompt.

B sequences, P prompt tokens (left padded), H key-value heads, D their width. A step costs one forward pass of the model and a handful of
operations on [B] tensors; nothing is copied that does not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stages.config import GenerationSettings
from stages.numerics.sampling import sample_tokens

COMPACT_BELOW = 0.75  # the cache is copied without its finished rows once fewer than this share of its rows are alive
FIRST_ROOM = 64  # response tokens that the cache has room for at first; doubled when they are used up
CUDA_CHECK_EVERY = 8  # steps between two looks at how many rows are alive, each of which makes the CPU wait for the GPU


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer [B, H, room, D], of which the first ``length`` columns are in use.

    transformers' own layer copies everything at every step to append one column; this one writes the column in place.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.room, self.length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if self.keys is None or end > self.keys.shape[-2]:
            self._make_room(key_states, value_states, end)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _make_room(self, key_states: Tensor, value_states: Tensor, end: int) -> None:
        width = end + max(self.room, self.length)
        self.keys = _widened(self.keys, key_states, self.length, width)
        self.values = _widened(self.values, value_states, self.length, width)
        self.device, self.is_initialized = key_states.device, True

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: Tensor, first_column: int) -> None:
        """Keep only ``rows`` (which may repeat), without the columns before ``first_column``."""
        assert self.keys is not None and self.values is not None
        self.keys = self.keys[:, :, first_column:][rows]
        self.values = self.values[:, :, first_column:][rows]
        self.length -= first_column


def _widened(old: Tensor | None, states: Tensor, length: int, width: int) -> Tensor:
    """Room for ``width`` columns of tensors like ``states`` [B, H, q, D], the first ``length`` of them those of ``old``."""
    made = states.new_empty((*states.shape[:2], width, states.shape[-1]))
    if old is not None:
        made[:, :, :length] = old[:, :, :length]
    return made


def make_cache(model: Any, room: int) -> tuple[Any, bool]:
    """A cache for ``model``, and whether every layer of it looks back without limit (then columns may be cut and masks be prepared)."""
    cache = DynamicCache(config=model.config)
    whole = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if whole:
        cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache, whole


def cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: transformers is renaming past_key_values to cache."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(plain.forward).parameters else "past_key_values"


@dataclass
class Decoded:
    """Responses and their log-probabilities [B, R], right padded, and the length of each row [B]."""

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor


def decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rows: Tensor,
    settings: GenerationSettings,
    noise: Tensor,
    *,
    stop_ids: Sequence[int],
    late_stop_ids: Sequence[int],
    pad_token_id: int,
) -> Decoded:
    """One response for each entry of ``rows`` [B]: the number of its prompt in ``prompt_ids``, ``prompt_mask`` [prompts, P].

    A prompt is read once, however many of the rows want it. ``noise`` [B, max_new_tokens] uniform in [0, 1).
    """
    device, most = prompt_ids.device, settings.max_new_tokens
    cache, whole = make_cache(model, min(most, FIRST_ROOM))
    stop_anywhere, stop_late = _stop_tables(model, stop_ids, late_stop_ids, device)
    named = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    positions = (prompt_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    mask = prompt_mask
    output = model(input_ids=prompt_ids, attention_mask=mask.long(), position_ids=positions, **named)
    logits, positions = output.logits[:, -1], positions[:, -1:] + 1
    number = len(rows)
    if not torch.equal(rows, torch.arange(len(prompt_ids), device=device)):
        logits, positions, mask = logits[rows], positions[rows], mask[rows]
        _keep(cache, rows, 0)

    ids = torch.full((number, most), pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros((number, most), device=device)
    lengths = torch.zeros(number, dtype=torch.long, device=device)
    alive = torch.arange(number, device=device)  # row of the batch -> row of the result
    running = torch.ones(number, dtype=torch.bool, device=device)  # by row of the batch
    columns = torch.nn.functional.pad(mask, (0, most), value=True)  # which columns of the cache count, at any step
    width = mask.shape[1]
    bias = _attention_bias(columns, logits.dtype)
    check_every = CUDA_CHECK_EVERY if device.type == "cuda" else 1
    for step in range(most):
        tokens, chosen = sample_tokens(
            logits, noise[alive, step], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        ids[alive, step] = torch.where(running, tokens, pad_token_id)
        logprobs[alive, step] = torch.where(running, chosen, 0.0)
        lengths[alive] += running
        running = running & ~(stop_late if step >= settings.stop_after else stop_anywhere)[tokens]
        if step + 1 == most:
            break
        if (step + 1) % check_every == 0:
            num_running = int(running.sum())
            if num_running == 0:
                break
            if num_running < COMPACT_BELOW * len(alive):
                kept = torch.nonzero(running).squeeze(1)
                # Columns that are padding for every row that is left go, too.
                first = int(columns[kept].long().argmax(dim=1).min()) if whole else 0
                tokens, positions, columns, alive = tokens[kept], positions[kept], columns[kept][:, first:], alive[kept]
                width -= first
                bias = _attention_bias(columns, logits.dtype)
                _keep(cache, kept, first)
                running = torch.ones(len(kept), dtype=torch.bool, device=device)
        width += 1
        step_mask = columns[:, :width].long() if not whole else None if bias is None else bias[..., :width]
        logits = model(input_ids=tokens[:, None], attention_mask=step_mask, position_ids=positions, **named).logits[:, -1]
        positions = positions + 1
    longest = int(lengths.max())
    return Decoded(ids[:, :longest], logprobs[:, :longest], lengths)


def _attention_bias(columns: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to a new token's attention scores [B, 1, 1, columns]; None where no column is padding.

    Numbers and not truth values: of those every layer would make numbers again.
    """
    if bool(columns.all()):
        return None
    return torch.zeros(columns.shape, dtype=dtype, device=columns.device).masked_fill_(~columns, -torch.inf)[:, None, None]


def _stop_tables(model: Any, stop_ids: Sequence[int], late_stop_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Whether each token [V] ends a response anywhere, and whether it ends one from ``stop_after`` on."""
    size = model.get_output_embeddings().weight.shape[0]
    anywhere = torch.zeros(size, dtype=torch.bool)
    anywhere[[token for token in stop_ids if token < size]] = True  # a tokenizer may have more tokens than the model has rows
    late = anywhere.clone()
    late[[token for token in late_stop_ids if token < size]] = True
    return anywhere.to(device), late.to(device)


def _keep(cache: Any, rows: Tensor, first_column: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(rows, first_column)
        else:
            layer.batch_select_indices(rows)

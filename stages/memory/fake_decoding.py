"""Count what a model keeps while it decodes, by reading prompts and one more token on tensors without data.

The cache is the one that decoding uses: transformers', or that of ``sampling/cache.py``. Its tensors are found by their size: those that
grow with the tokens are keys and values in every family, and the others are states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from stages.memory.decoding import DecodingMemory, LayerStates, Method
from stages.memory.fake_passes import LiveBytes, are_alike, full_model, give_fake_weights, text_config_of, without_values
from stages.memory.passes import PassKind
from stages.sampling.cache import (
    PromptLayer,
    SlotLayer,
    SlotWindow,
    decoding_attention,
    forward_options,
    layers_of,
    make_cache,
    make_slot_cache,
    prompt_cache,
    put_prompts,
    reads_by_columns,
    stored_dtype,
)
from stages.sampling.support import DecodingSupport, decoding_support

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

ROWS = 2
COLUMNS = 24  # the longest text of a count
VOCABULARY = 64  # logits are counted elsewhere
Kind = tuple[str, int]
"""The class of a cache layer, and its window (0: none)."""


def count(kind: PassKind) -> DecodingMemory:
    """Read prompts of two lengths and one more token each. Raises the errors of the model's code on fake tensors."""
    kinds = _cache_kinds(kind, None)
    layers = _number_of_layers(kind, kinds)
    model = _model(kind, layers)
    support = decoding_support(model)
    method: Method = "text" if support.cache_name is None else "in place" if support.adds_mask else "cache"
    slots = -1 if support.slot_tokens == math.inf else int(support.slot_tokens)
    if method == "text":
        return DecodingMemory((), method, False, slots, (0.0, 0.0), (0.0, 0.0), support.limits_logits)
    columns = _columns(kinds)
    with FakeTensorMode(allow_non_fake_inputs=True), without_values(kind), torch.no_grad(), _precision(kind):
        give_fake_weights(model, kind)
        by_columns = kind.device == "cpu" and reads_by_columns(model)
        run = _in_place if method == "in place" else _with_cache
        runs = [run(model, support, width) for width in columns]
        in_slots = [_in_slots(model, support, width) for width in columns] if kind.device != "cpu" and slots else []
    states = _states(kinds[:layers], [sizes for sizes, _, _ in runs], columns)
    return DecodingMemory(
        _counted_layers(kinds, states, layers),
        method,
        by_columns,
        slots,
        _line([step for _, step, _ in runs], columns),
        _line(in_slots, columns) if in_slots else (0.0, 0.0),
        support.limits_logits,
        runs[-1][2],
    )


# Which layers are run


def _cache_kinds(kind: PassKind, layers: int | None) -> list[Kind]:
    """The kind of each layer of transformers' cache for the first ``layers`` layers (None: all)."""
    config = text_config_of(kind, layers)
    made = DynamicCache(config=config).layers
    kinds = [(type(layer).__name__, int(getattr(layer, "sliding_window", 0) or 0)) for layer in made]
    return kinds or [("", 0)] * int(config.num_hidden_layers)


def _number_of_layers(kind: PassKind, kinds: list[Kind]) -> int:
    """The smallest number of first layers that have a cache layer of every kind; all layers if the layers have different weights."""
    first = max(kinds.index(one) for one in kinds) + 1
    number = max(2, first)  # RWKV cannot be made with one layer
    if number >= len(kinds) or not are_alike(kind, len(kinds)):
        return len(kinds)
    return number if _cache_kinds(kind, number) == kinds[:number] else len(kinds)


def _columns(kinds: list[Kind]) -> tuple[int, int]:
    """Two lengths of text, in tokens, that fit into every window."""
    longest = min([COLUMNS, *(window - 1 for _, window in kinds if window > 2)])
    return max(1, longest // 2), max(2, longest)


def _model(kind: PassKind, layers: int) -> TransformersModel:
    """A language model for text with its first layers, on the meta device."""
    small = replace(kind, vocabulary=VOCABULARY, adapter=None, task="CAUSAL_LM")
    return full_model(small, layers).eval()


# Runs: bytes of the tensors of every cache layer, the largest tensors of a step, and ``DecodingMemory.stored``


Sizes = list[list[int]]
"""Bytes of each tensor of each layer of a cache."""


def _in_place(model: TransformersModel, support: DecodingSupport, width: int) -> tuple[Sizes, float, float]:
    cache = make_cache(model, 2)
    read = prompt_cache(cache)
    model(input_ids=_ids(width), **_options(support, read, cache))
    sizes, stored = _sizes(read), _stored(read)
    put_prompts(cache, read, 0, ROWS, width)
    read.layers.clear()
    mask = torch.zeros((ROWS, 1, 1, width + 1), dtype=_dtype_of(cache))

    def step() -> None:
        inputs = {"input_ids": _ids(1), "attention_mask": mask, "position_ids": torch.full((ROWS, 1), width)}
        model(**inputs, **forward_options(support, cache))

    with decoding_attention(model, cache):
        return sizes, _taken_by(step), stored


def _with_cache(model: TransformersModel, support: DecodingSupport, width: int) -> tuple[Sizes, float, float]:
    cache = DynamicCache(config=model.config)
    options = forward_options(support, cache)
    with LiveBytes() as live:
        model(input_ids=_ids(width), **options)
        sizes, stored, before = _sizes(cache), _stored(cache), live.now
        live.peak = before
        model(input_ids=_ids(1), **options)
    return sizes, live.peak - before, stored


def _in_slots(model: TransformersModel, support: DecodingSupport, width: int) -> float:
    at = torch.full((ROWS,), width)
    cache = make_slot_cache(model, SlotWindow(ROWS, width + 1, at), ROWS)
    read = prompt_cache(cache)
    model(input_ids=_ids(width), **_options(support, read, cache))
    every = torch.arange(ROWS)
    for layer, part in zip(layers_of(cache, SlotLayer), layers_of(read, PromptLayer), strict=True):
        layer.by_columns = False  # as on a GPU
        if part.keys is not None and part.values is not None:
            layer.put(part.keys, part.values, every, every, at, width + 1)
    mask = torch.zeros((ROWS, 1, 1, width + 1), dtype=_dtype_of(cache))
    inputs = {"input_ids": _ids(1), "attention_mask": mask, "position_ids": at[:, None]}
    with decoding_attention(model, cache):
        return _taken_by(lambda: model(**inputs, **forward_options(support, cache)))


def _ids(width: int) -> Tensor:
    return torch.ones(ROWS, width, dtype=torch.long)


def _options(support: DecodingSupport, read: DynamicCache, cache: DynamicCache) -> dict[str, object]:
    return {name: read if value is cache else value for name, value in forward_options(support, cache).items()}


def _dtype_of(cache: DynamicCache) -> torch.dtype:
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return next(tensor.dtype for tensor in keys if isinstance(tensor, Tensor))


def _sizes(cache: DynamicCache) -> Sizes:
    return [[tensor.nbytes for tensor in tensors] for tensors in _tensors(cache)]


def _stored(cache: DynamicCache) -> float:
    """Bytes of the tensors of ``cache`` in a cache of this project, relative to their own bytes."""
    made = [tensor for tensors in _tensors(cache) for tensor in tensors]
    return sum(tensor.numel() * stored_dtype(tensor).itemsize for tensor in made) / max(1, sum(tensor.nbytes for tensor in made))


def _tensors(cache: DynamicCache) -> list[list[Tensor]]:
    return [[leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor) and leaf.ndim] for layer in cache.layers]


def _taken_by(step: Callable[[], object]) -> float:
    """The most bytes of tensors that a step makes and has at the same time."""
    with LiveBytes() as live:
        step()
    return live.peak


@contextmanager
def _precision(kind: PassKind) -> Iterator[None]:
    """Autocast, if the weights are those of mixed-precision training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=kind.compute < kind.weights):
        yield


# From sizes to bytes per row and token


def _states(kinds: Sequence[Kind], sizes: Sequence[Sizes], columns: tuple[int, int]) -> list[LayerStates]:
    """The states of each layer that was run. ``sizes``: of the two lengths in ``columns``."""
    (short, long), made = columns, []
    for (_, window), few, many in zip(kinds, *sizes, strict=True):
        grown = [(less, more) for less, more in zip(few, many, strict=True) if less != more]
        token = sum(more - less for less, more in grown) / (long - short) / ROWS
        state = sum(many) / ROWS - token * long
        made.append(LayerStates(token, max(0.0, state), window, 1))
    return made


def _counted_layers(kinds: list[Kind], states: list[LayerStates], layers: int) -> tuple[LayerStates, ...]:
    """The states of all layers. A layer that was not run has those of the first layer of its kind."""
    every = [states[index] if index < layers else states[kinds.index(kinds[index])] for index in range(len(kinds))]
    ordered = sorted(every, key=lambda one: (one.token, one.state, one.window))
    return tuple(replace(one, number=len(list(like))) for one, like in groupby(ordered))


def _line(taken: Sequence[float], columns: tuple[int, int]) -> tuple[float, float]:
    """(bytes per row, bytes per row and token) of the line through two measurements."""
    slope = max(0.0, (taken[1] - taken[0]) / (columns[1] - columns[0]) / ROWS)
    return max(0.0, taken[1] / ROWS - slope * columns[1]), slope

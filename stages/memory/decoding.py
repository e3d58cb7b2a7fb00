"""What a model keeps while it decodes: keys and values, the states of recurrent layers, and the tensors of a step. Does not import torch.

R rows (sequences decoded together), T tokens of a row so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stages.kernels.token_budget import GRAPH_COLUMNS, PROMPT_TOKENS, rows_per_batch

COLUMN_ROOM, ROW_ROOM = 24, 64
"""Tokens for which a cache of ``sampling/cache.py`` first has room after the prompts: if tokens are columns, and if they are rows."""

Method = Literal["in place", "cache", "text"]
"""in place: a cache of this project, to which tokens are appended without a copy, or its slots. cache: transformers' own cache. text: no
cache; each step reads the text so far."""


@dataclass(frozen=True)
class LayerStates:
    """What like layers keep for each row: ``token`` bytes per token, of at most ``window`` tokens (0: of all), and ``state`` bytes.

    ``number``: of such layers.
    """

    token: float
    state: float
    window: int
    number: int

    def bytes_at(self, tokens: float, *, windows: bool) -> float:
        """Bytes per row of one such layer. ``windows``: whether tokens outside the window are dropped."""
        kept = min(tokens, self.window) if windows and self.window else tokens
        return self.token * kept + self.state


@dataclass(frozen=True)
class DecodingMemory:
    """How a model decodes, and what that takes.

    ``by_columns``: whether the cache has room as ``ColumnLayer`` has it. ``slot_tokens``: the longest sequence that slots hold; -1: any.
    ``stored``: bytes of keys and values in a cache of this project, relative to those that the model makes; under autocast it stores fp32
    keys in half precision. ``step`` and ``slot_step``: the largest tensors of one step with transformers' cache or the cache in place, and
    in slots: bytes per row, and per row and token. ``limits_logits``: whether a pass over prompts computes only the last token's logits.
    """

    layers: tuple[LayerStates, ...]
    method: Method
    by_columns: bool
    slot_tokens: int
    step: tuple[float, float]
    slot_step: tuple[float, float]
    limits_logits: bool
    stored: float = 1.0

    def in_slots(self, tokens: int, device: str) -> bool:
        """Whether sequences of up to ``tokens`` tokens are decoded in slots. Without continuous batching only a GPU has them."""
        return device != "cpu" and (self.slot_tokens < 0 or tokens <= self.slot_tokens)

    def reads_in_parts(self, tokens: int, device: str) -> bool:
        """Whether prompts are read in several passes. Otherwise one pass reads the prompts of all rows."""
        return self.method == "in place" or self.in_slots(tokens, device)

    def kept(self, tokens: float, *, windows: bool = True) -> float:
        """Bytes per row of all layers, as the model makes them."""
        return sum(layer.number * layer.bytes_at(tokens, windows=windows) for layer in self.layers)

    def of_step(self, tokens: float, device: str) -> float:
        """Bytes per row of the largest tensors of a step. With transformers' cache they include the copies of the keys of a layer."""
        windows = [layer.window for layer in self.layers if layer.token]
        if self.in_slots(int(tokens), device):
            fixed, token = self.slot_step
        else:
            fixed, token = self.step
            tokens = min(tokens, max(windows)) if windows and all(windows) else tokens
        return fixed + token * tokens

    def largest(self, tokens: float) -> float:
        """Bytes per row of the keys and values of the largest layer."""
        return max((layer.token * min(tokens, layer.window or tokens) for layer in self.layers), default=0.0)


def read_rows(memory: DecodingMemory, rows: int, prompt: int, tokens: int, device: str) -> int:
    """Rows of the largest pass over prompts of ``prompt`` tokens. ``tokens``: most tokens of a prompt with its completion."""
    if not memory.reads_in_parts(tokens, device):
        return rows
    return rows_per_batch(min(rows, max(1, PROMPT_TOKENS // max(1, prompt))), prompt, device_type=device)


def cached(memory: DecodingMemory, rows: int, prompt: int, new: int, device: str) -> tuple[float, float]:
    """Bytes of the cache (after the prompts are read, at the end), including free room, and what a cache in place copies when it grows.

    The last sampled token is not read, so the cache does not get it.
    """
    tokens = prompt + new
    if memory.in_slots(tokens, device):
        columns = -(-tokens // GRAPH_COLUMNS) * GRAPH_COLUMNS
        full = rows * memory.stored * memory.kept(columns, windows=False)
        return full, full
    if memory.method == "text":
        return 0.0, 0.0
    if memory.method == "in place":
        first, last, before = columns_in_place(prompt, new, by_columns=memory.by_columns)
        stored = rows * memory.stored
        return stored * memory.kept(first), stored * (memory.kept(last) + memory.largest(before))
    # A layer with a window keeps a view of the prompt's keys, and so all of them, until the first step.
    return rows * memory.kept(prompt, windows=False), rows * memory.kept(tokens - 1)


def columns_in_place(prompt: int, new: int, *, by_columns: bool) -> tuple[int, int, int]:
    """Tokens for which a cache in place has room: (at first, at the end, before it grew for the last time; 0 if it did not grow)."""
    room = min(new, COLUMN_ROOM if by_columns else ROW_ROOM)
    first = columns = prompt + room
    before = 0
    while columns < prompt + new - 1:
        before = columns
        columns += 1 + max(room, columns // 8 if by_columns else columns)
    return first, columns, before

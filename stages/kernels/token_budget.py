"""Token budgets: how to divide sequences into forward passes; and the sizes that passes and the memory planner share."""

from __future__ import annotations

from collections.abc import Sequence

CPU_TOKENS = 800
"""Tokens of a forward pass on a CPU, including padding. More tokens do not make products faster, but activations then exceed the caches."""
GPU_TOKENS = 32_768
"""Maximum tokens of a forward pass on a GPU if the budget depends on free memory. More tokens use more memory without more speed."""
GPU_SHARE = 0.85
"""Share of free GPU memory that such a pass may use. The rest is for memory that the allocator loses between blocks."""

KEPT_SHARE = 0.05
"""Share of the GPU's memory up to which decoding keeps its cache and recorded steps between two calls."""
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Size of a chunk of fp32 logits by device type: what fits in a core's cache, or what keeps a GPU busy."""
PROMPT_TOKENS = 16_384
"""Tokens of one forward pass over prompts before decoding: enough to fill a GPU; it limits the memory for activations."""
GRAPH_COLUMNS = 64
"""On a GPU, the columns of the KV cache are a multiple of this; it is also the smallest size of a recorded decoding step."""


def token_budget_batches(
    order: Sequence[int],
    lengths: Sequence[int],
    *,
    rows: int | None,
    device_type: str,
    tokens: float = float("inf"),
    packed: bool = False,
) -> list[list[int]]:
    """Divide the sequences of ``order`` into consecutive batches within the token budget.

    The number of batches is minimal; among such divisions the largest batch is as small as possible. A batch has at most ``rows``
    sequences (None: no limit) and at most ``tokens`` tokens, on a CPU also at most CPU_TOKENS; but at least one sequence. ``lengths`` is
    indexed by the entries of ``order``. Padding counts, so sort ``order`` by length to minimize it; ``packed``: no padding.
    """
    rows = max(1, len(order)) if rows is None else rows
    limit = min(tokens, CPU_TOKENS) if device_type == "cpu" else tokens
    batches = _filled(order, lengths, rows, limit, packed)
    while batches:
        largest = max(tokens_of(batch, lengths, packed=packed) for batch in batches)
        tighter = _filled(order, lengths, rows, largest - 1, packed)
        if len(tighter) > len(batches) or max(tokens_of(batch, lengths, packed=packed) for batch in tighter) >= largest:
            break
        batches = tighter
    return batches


def rows_per_batch(rows: int, length: int, *, device_type: str, tokens: float = float("inf")) -> int:
    """Number of sequences of ``length`` tokens in a batch with at most ``rows`` sequences and ``tokens`` tokens."""
    limit = min(tokens, CPU_TOKENS) if device_type == "cpu" else tokens
    return rows if limit == float("inf") else min(rows, max(1, int(limit) // length))


def tokens_of(batch: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> int:
    """Tokens in a forward pass over the sequences of ``batch``, including padding unless they are packed."""
    return sum(lengths[row] for row in batch) if packed else len(batch) * max(lengths[row] for row in batch)


def _filled(order: Sequence[int], lengths: Sequence[int], rows: int, tokens: float, packed: bool) -> list[list[int]]:
    """Fill every batch as far as possible."""
    batches: list[list[int]] = []
    longest = total = 0
    for row in order:
        longest, total = max(longest, lengths[row]), total + lengths[row]
        if not batches or len(batches[-1]) == rows or (total if packed else longest * (len(batches[-1]) + 1)) > tokens:
            batches.append([])
            longest = total = lengths[row]
        batches[-1].append(row)
    return batches

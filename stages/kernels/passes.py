"""How many sequences go through a model at once."""

from __future__ import annotations

from collections.abc import Sequence

CPU_TOKENS = 800
"""Tokens of a pass on a CPU, padding among them. More of them make no product faster there, but activations that outgrow the caches."""
GPU_TOKENS = 32_768
"""Most tokens of a pass on a GPU where its size is chosen by its memory: they fill the largest card, and more would only take memory."""
GPU_SHARE = 0.85
"""Of the free memory, what such passes may take; the rest is for what the allocator loses between blocks."""


def passes(
    order: Sequence[int],
    lengths: Sequence[int],
    *,
    rows: int | None,
    device_type: str,
    tokens: float = float("inf"),
    packed: bool = False,
) -> list[list[int]]:
    """The sequences of ``order``, neighbours together, in as few passes as can be, of which the largest is as small as can be.

    A pass has at most ``rows`` sequences (None: any number) and at most ``tokens`` tokens, on a CPU at most CPU_TOKENS; but one sequence
    at least. ``lengths``: of all sequences, by their numbers in ``order``. Padding counts, so neighbours of like length waste least;
    ``packed``: there is none.
    """
    rows = max(1, len(order)) if rows is None else rows
    limit = min(tokens, CPU_TOKENS) if device_type == "cpu" else tokens
    made = _filled(order, lengths, rows, limit, packed)
    while made:
        largest = max(tokens_of(group, lengths, packed=packed) for group in made)
        tighter = _filled(order, lengths, rows, largest - 1, packed)
        if len(tighter) > len(made) or max(tokens_of(group, lengths, packed=packed) for group in tighter) >= largest:
            break
        made = tighter
    return made


def rows_of_a_pass(rows: int, length: int, *, device_type: str, tokens: float = float("inf")) -> int:
    """How many sequences of ``length`` tokens a pass has, where ``rows`` sequences and ``tokens`` tokens are allowed."""
    limit = min(tokens, CPU_TOKENS) if device_type == "cpu" else tokens
    return rows if limit == float("inf") else min(rows, max(1, int(limit) // length))


def tokens_of(group: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> int:
    """Tokens of a pass over the sequences of ``group``, with their padding unless they are packed."""
    return sum(lengths[row] for row in group) if packed else len(group) * max(lengths[row] for row in group)


def _filled(order: Sequence[int], lengths: Sequence[int], rows: int, tokens: float, packed: bool) -> list[list[int]]:
    """Every pass as full as it may be."""
    made: list[list[int]] = []
    longest = total = 0
    for row in order:
        longest, total = max(longest, lengths[row]), total + lengths[row]
        if not made or len(made[-1]) == rows or (total if packed else longest * (len(made[-1]) + 1)) > tokens:
            made.append([])
            longest = total = lengths[row]
        made[-1].append(row)
    return made

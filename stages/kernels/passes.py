"""How many sequences go through a model at once."""

from __future__ import annotations

from collections.abc import Sequence

CPU_TOKENS = 800
"""Tokens of a pass on a CPU, padding among them. More of them make no product faster there, but activations that outgrow the caches."""


def passes(order: Sequence[int], lengths: Sequence[int], *, rows: int, device_type: str) -> list[list[int]]:
    """The sequences of ``order``, neighbours together, in as few passes as can be, of which the largest is as small as can be.

    A pass has at most ``rows`` sequences, and on a CPU at most CPU_TOKENS tokens, but one sequence at least. ``lengths``: of all sequences,
    by their numbers in ``order``. Neighbours of like length waste least.
    """
    made = _filled(order, lengths, rows, CPU_TOKENS if device_type == "cpu" else float("inf"))
    while made:
        largest = max(_tokens(group, lengths) for group in made)
        tighter = _filled(order, lengths, rows, largest - 1)
        if len(tighter) > len(made) or max(_tokens(group, lengths) for group in tighter) >= largest:
            break
        made = tighter
    return made


def rows_of_a_pass(rows: int, length: int, *, device_type: str) -> int:
    """How many sequences of ``length`` tokens a pass has, where ``rows`` are allowed."""
    return min(rows, max(1, CPU_TOKENS // length)) if device_type == "cpu" else rows


def _filled(order: Sequence[int], lengths: Sequence[int], rows: int, tokens: float) -> list[list[int]]:
    """Every pass as full as it may be."""
    made: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        if not made or len(made[-1]) == rows or longest * (len(made[-1]) + 1) > tokens:
            made.append([])
            longest = lengths[row]
        made[-1].append(row)
    return made


def _tokens(group: Sequence[int], lengths: Sequence[int]) -> int:
    return len(group) * max(lengths[row] for row in group)

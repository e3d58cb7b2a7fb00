"""How many sequences go through a model at once."""

from __future__ import annotations

from collections.abc import Sequence

CPU_TOKENS = 640
"""Tokens of a pass on a CPU, padding among them. More of them make no product faster there, but activations that outgrow the caches."""


def passes(order: Sequence[int], lengths: Sequence[int], *, rows: int, device_type: str) -> list[list[int]]:
    """The sequences of ``order``, neighbours together: at most ``rows`` in a pass, and on a CPU at most CPU_TOKENS, but one at least.

    ``lengths``: of all sequences, by their numbers in ``order``. Neighbours of like length waste least.
    """
    most = CPU_TOKENS if device_type == "cpu" else float("inf")
    made: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        if not made or len(made[-1]) == rows or longest * (len(made[-1]) + 1) > most:
            made.append([])
            longest = lengths[row]
        made[-1].append(row)
    return made


def rows_of_a_pass(rows: int, length: int, *, device_type: str) -> int:
    """How many sequences of ``length`` tokens a pass has, where ``rows`` are allowed."""
    return len(passes(range(rows), [length] * rows, rows=rows, device_type=device_type)[0])

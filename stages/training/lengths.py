"""Leave out training rows that are too long, and say how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from stages.errors import DataError
from stages.step import StepContext

Row = TypeVar("Row")


def short_enough(rows: Sequence[Row], length: Callable[[Row], int], max_length: int, what: str, context: StepContext) -> list[Row]:
    """The rows with at most ``max_length`` tokens. Longer ones are not truncated, because that would teach a false ending.

    ``what`` names a row in messages, e.g. ``training pair``. Raises DataError if no row is left.
    """
    kept = [row for row in rows if length(row) <= max_length]
    if not kept:
        shortest = min((length(row) for row in rows), default=0)
        fits = f"no {what} fits max_length={max_length}"
        raise DataError(f"{fits}: the shortest of {len(rows)} has {shortest} tokens; raise max_length, or add shorter rows")
    if len(kept) < len(rows):
        left_out = f"left out {len(rows) - len(kept)} of {len(rows)} {what}s longer than {max_length} tokens"
        context.runtime.console.print(f"{context.name}: {left_out}")
    return kept

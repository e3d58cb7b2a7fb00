"""Batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Sequence


def like_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The rows in batches of at most ``batch_size``, from short to long; one of a quarter of that ends where rows get a fifth longer."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        last = batches[-1] if batches else []
        longer = last and len(last) >= batch_size / 4 and lengths[row] > 1.2 * lengths[last[0]]
        if not last or len(last) == batch_size or longer:
            batches.append([])
        batches[-1].append(row)
    return batches

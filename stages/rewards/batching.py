"""Batching rows of similar length."""

from __future__ import annotations

from collections.abc import Sequence


def like_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches of at most ``batch_size``, sorted from short to long.

    A batch with at least a quarter of ``batch_size`` rows ends before a row that is over 20 % longer than the batch's first row.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        last = batches[-1] if batches else []
        longer = last and len(last) >= batch_size / 4 and lengths[row] > 1.2 * lengths[last[0]]
        if not last or len(last) == batch_size or longer:
            batches.append([])
        batches[-1].append(row)
    return batches

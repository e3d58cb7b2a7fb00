"""Batch rows of similar length, and pad token rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.kernels.transfers import moved_together
from stages.sampling.padding import right_pad


def similar_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
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


def padded(rows: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows as right-padded ids and attention mask, both [B, T]."""
    ids = right_pad([torch.tensor(row) for row in rows], pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    ids, mask = moved_together([ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()], device)
    return ids, mask

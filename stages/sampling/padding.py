"""Padding token rows of different lengths into one tensor. B rows, P prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad token rows on the left; returns (ids, mask), both [B, P]. Generation continues from the last column, so padding goes first."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = True
    return ids.to(device), mask.to(device)


def right_pad(rows: Sequence[Tensor], value: float, width: int | None = None) -> Tensor:
    """Pad rows of any length on the right with ``value``; returns one tensor [B, width]. ``width`` None: the longest row's length."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    missing = 0 if width is None else width - padded.shape[1]
    return torch.nn.functional.pad(padded, (0, missing), value=value) if missing > 0 else padded

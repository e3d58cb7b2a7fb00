"""Packing: several demonstrations in one row.

TRL's own packing makes a single row of the full batch. Without flash attention, its attention mask grows with the square of the row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from stages.sft.rows import EncodedRow
from stages.training.reproducible import IGNORED


def pack_rows(rows: Sequence[EncodedRow], max_length: int, completion_only: bool) -> dict[str, list[list[int]]]:
    """Pack rows into few rows of at most ``max_length`` tokens (best fit, longest first).

    Returns the columns input_ids, labels and position_ids. Positions start at 0 for each demonstration, so attention does not cross them.
    """
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    packed: list[list[EncodedRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        slot = bisect.bisect_left(room, (len(row.ids), -1))
        if slot == len(room):
            packed.append([row])
            free, index = max_length, len(packed) - 1
        else:
            free, index = room.pop(slot)
            packed[index].append(row)
        bisect.insort(room, (free - len(row.ids), index))
    return {
        "input_ids": [[token for row in group for token in row.ids] for group in packed],
        "labels": [[label for row in group for label in _labels(row, completion_only)] for group in packed],
        "position_ids": [[position for row in group for position in range(len(row.ids))] for group in packed],
    }


def _labels(row: EncodedRow, completion_only: bool) -> list[int]:
    return [token if counts else IGNORED for token, counts in zip(row.ids, row.counted(completion_only), strict=True)]


class PackedCollator:
    """Pads packed rows on the right. The padding acts as another demonstration (positions start at 0) without counted labels."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        padded: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            missing = width - len(row["input_ids"])
            padded["input_ids"].append(row["input_ids"] + [self.pad_token_id] * missing)
            padded["labels"].append(row["labels"] + [IGNORED] * missing)
            padded["position_ids"].append(row["position_ids"] + list(range(missing)))
        return {name: torch.tensor(values) for name, values in padded.items()}

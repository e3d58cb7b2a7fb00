"""Packing: several demonstrations in one row.

TRL's own packing makes a single row of the full batch. Without flash attention, its attention mask grows with the square of the row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.errors import ModelError
from stages.models.parts import transformer_of
from stages.sampling.support import PASS_FAILURES, no_cache, plain_model
from stages.sft.rows import EncodedRow
from stages.training.reproducible import IGNORED

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

TEST_LENGTHS = (9, 7)  # tokens of the test's demonstrations
LEAK = {torch.float32: 1e-4}  # relative change of hidden states; equal inputs differ at most by the rounding of experts
LEAK_IN_HALF_PRECISION = 1e-2
ROUNDING = {torch.float32: 1e-3}  # the same between passes of different widths
ROUNDING_IN_HALF_PRECISION = 5e-2


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


@torch.no_grad()
def refuse_leaks(model: TransformersModel, name: str, precision: torch.dtype) -> None:
    """Raise ModelError if ``model``, called ``name``, computes something else for a demonstration after another one in its row.

    Recurrent states go on to the next demonstration (Mamba, Qwen3-Next), and some classes attend to all earlier tokens of a row at all
    positions (BLOOM, OPT, gpt-oss). ``precision``: the dtype of the passes.
    """
    plain = plain_model(model)
    device, training = next(plain.parameters()).device, plain.training
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    plain.eval()
    try:
        with autocast:
            problem = _leak(model, device, precision)
    except PASS_FAILURES as error:
        problem = f"its class does not accept packed rows ({' '.join(str(error).split())[:160]})"
    finally:
        plain.train(training)
        torch.clear_autocast_cache()  # a cast made without gradient must not be reused by a pass with gradient
    if problem:
        raise ModelError(f"packing: true does not work with {name!r} ({type(plain).__name__}): {problem}. Remove packing")


def _leak(model: TransformersModel, device: torch.device, precision: torch.dtype) -> str:
    """What a demonstration changes in the next one of its row; empty if nothing."""
    decoder = transformer_of(model)
    before, after = TEST_LENGTHS
    first, second, third = (torch.arange(3, 3 + size, device=device) + 20 * part for part, size in enumerate((before, before, after)))
    size = plain_model(model).config.get_text_config().vocab_size
    rows = torch.stack([torch.cat([first, third]), torch.cat([second, third])]) % size
    positions = torch.cat([torch.arange(before, device=device), torch.arange(after, device=device)]).expand(2, -1)
    one, other = decoder(input_ids=rows, position_ids=positions, **no_cache(decoder)).last_hidden_state[:, before:].float()
    alone = decoder(input_ids=rows[:1, before:], **no_cache(decoder)).last_hidden_state[0].float()
    if _change(one, other) > LEAK.get(precision, LEAK_IN_HALF_PRECISION):
        return "a demonstration changes what the model computes for the next one in its row"
    if _change(one, alone) > ROUNDING.get(precision, ROUNDING_IN_HALF_PRECISION):
        return "it ignores the positions of the second demonstration in a row"
    return ""


def _change(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())

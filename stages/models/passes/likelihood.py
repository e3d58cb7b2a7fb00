"""Likelihood of given tokens under a causal language model: the basis of held-out loss, perplexity and bits per byte.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.nn import functional

from stages.kernels.transfers import moved_together
from stages.models.parts import evaluation_mode
from stages.models.passes.budget import each_group, refuse_alone
from stages.models.passes.right_padding import without_masks
from stages.models.sharding import gathers_in_passes

# Only training shards weights, and its held-out rows have the size of its passes.
SHARDED_ADVICE = "Set training.microbatch_size to fewer sequences, use shorter texts, or quantize the model (quantization: nf4)"


@dataclass(frozen=True)
class Likelihood:
    """Summed negative log-likelihood (in nats) of ``tokens`` predicted tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per UTF-8 byte of the tokens' text, which is comparable across tokenizers."""
        return self.nats / math.log(2) / num_bytes


@torch.inference_mode()
def measure_likelihood(
    model: torch.nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Likelihood:
    """Measure the likelihood of ``rows`` of (token ids, mask). A token counts if its mask is 1, except the first, which nothing predicts.

    The rows are distributed over the processes and the sums are all-reduced, so every process returns the same value. Computes in
    ``dtype``. If memory runs out, a pass is repeated in halves; with sharded weights this is a TrainingError.
    """
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))  # batches of similar lengths need little padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    measured: list[tuple[float, int]] = []  # (nats, counted tokens) of each pass of this process

    def one_pass(indices: Sequence[int]) -> tuple[float, int]:
        return _of_rows(model, [rows[index] for index in indices], pad_token_id, device, dtype)

    with evaluation_mode(model):
        if gathers_in_passes(model):
            measured += _in_equally_many_passes(batches, one_pass, state)
        else:
            own = batches[state.process_index :: state.num_processes]
            each_group("held-out likelihood", own, lambda indices: measured.append(one_pass(indices)), known_by=model)
    nats, tokens = sum(nats for nats, _ in measured), sum(tokens for _, tokens in measured)
    if state.num_processes > 1:
        reduced = reduce(torch.tensor([nats, float(tokens)], dtype=torch.float64, device=device), "sum")
        nats, tokens = float(reduced[0]), int(reduced[1])
    return Likelihood(float(nats), tokens)


def _of_rows(
    model: torch.nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    """(nats, counted tokens) of some rows, in one pass. The CPU waits for a GPU once."""
    padded = _padded(rows, pad_token_id)
    columns = [mask.nonzero()[:, 0] for mask in padded[2][:, 1:]]  # before the target token of each counted prediction
    input_ids, attention_mask, flat = moved_together([*padded[:2], torch.cat(columns)], device)
    sizes = [len(own) for own in columns]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32), without_masks(model):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return _summed_loss(logits, input_ids, flat.split(sizes)), sum(sizes)


def _in_equally_many_passes(
    batches: Sequence[Sequence[int]], one_pass: Callable[[Sequence[int]], tuple[float, int]], state: PartialState
) -> Iterator[tuple[float, int]]:
    """The results of this process's batches. Every process makes equally many passes, because all take part in each of them.

    Results of surplus passes are left out. Raises PassTooLarge if memory runs out.
    """
    for turn in range(math.ceil(len(batches) / state.num_processes)):
        index = turn * state.num_processes + state.process_index
        try:
            result = one_pass(batches[min(index, len(batches) - 1)])
        except Exception as error:
            refuse_alone(error, "held-out likelihood", SHARDED_ADVICE)
            raise
        if index < len(batches):
            yield result


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask and loss mask, each [B, T], on the CPU."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    counted = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, (ids, mask) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        attention_mask[row, : len(ids)] = 1
        counted[row, : len(ids)] = torch.as_tensor(mask, dtype=torch.bool)
    return input_ids, attention_mask, counted


def _summed_loss(logits: Tensor, input_ids: Tensor, columns: Sequence[Tensor]) -> float:
    """Sum of -log p(token | previous tokens) over the tokens after ``columns`` of each row.

    Logits [B, T, V]; one row at a time to limit fp32 memory.
    """
    losses = [
        functional.cross_entropy(row_logits[own].float(), row_ids[own + 1], reduction="sum")
        for row_logits, row_ids, own in zip(logits, input_ids, columns, strict=True)
    ]
    return sum(torch.stack(losses).tolist())

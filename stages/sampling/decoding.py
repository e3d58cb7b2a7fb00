"""Decoding one batch token by token: rows that leave once they have ended, one prefill per prompt.

B sequences, P prompt tokens (left padded), V vocabulary. A step costs one forward pass of the model and a handful of operations on [B]
tensors; nothing is copied that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.config import GenerationSettings
from stages.sampling.choosing import sample_tokens
from stages.sampling.readers import make_reader
from stages.sampling.support import DecodingSupport

COMPACT_BELOW = 0.75  # the cache is copied without its finished rows once fewer than this share of its rows are alive
CUDA_CHECK_EVERY = 8  # steps between two looks at how many rows are alive, each of which makes the CPU wait for the GPU


@dataclass
class Decoded:
    """Responses and their log-probabilities [B, R], right padded, and the length of each row [B]."""

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor


def decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rows: Tensor,
    settings: GenerationSettings,
    noise: Tensor,
    *,
    support: DecodingSupport,
    stop_ids: Sequence[int],
    late_stop_ids: Sequence[int],
    pad_token_id: int,
) -> Decoded:
    """One response for each entry of ``rows`` [B]: the index of its prompt in ``prompt_ids``, ``prompt_mask`` [prompts, P].

    A prompt is read once, however many of the rows want it. ``noise`` [B, max_new_tokens] uniform in [0, 1). Where ``support`` says that
    the model cannot hide padding, the prompts have one length.
    """
    device, most = prompt_ids.device, settings.max_new_tokens
    reader = make_reader(model, support, most, cuda_graphs=settings.cuda_graphs)
    logits = reader.read(prompt_ids, prompt_mask)
    if not torch.equal(rows, torch.arange(len(prompt_ids), device=device)):
        logits = logits[rows]
        reader.keep(rows, trim=False)
    number = len(rows)
    stop_anywhere, stop_late = _stop_tables(logits.shape[-1], stop_ids, late_stop_ids, device)
    ids = torch.full((number, most), pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros((number, most), device=device)
    lengths = torch.zeros(number, dtype=torch.long, device=device)
    alive = torch.arange(number, device=device)  # row of the batch -> row of the result
    running = torch.ones(number, dtype=torch.bool, device=device)  # by row of the batch
    check_every = CUDA_CHECK_EVERY if device.type == "cuda" else 1
    with reader.stepping():
        for step in range(most):
            tokens, chosen = sample_tokens(
                logits, noise[alive, step], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )
            ids[alive, step] = torch.where(running, tokens, pad_token_id)
            logprobs[alive, step] = torch.where(running, chosen, 0.0)
            lengths[alive] += running
            running = running & ~(stop_late if step >= settings.stop_after else stop_anywhere)[tokens]
            if step + 1 == most:
                break
            if (step + 1) % check_every == 0:
                num_running = int(running.sum())
                if num_running == 0:
                    break
                if num_running < COMPACT_BELOW * len(alive):
                    kept = torch.nonzero(running).squeeze(1)
                    tokens, alive = tokens[kept], alive[kept]
                    reader.keep(kept, trim=True)
                    running = torch.ones(len(kept), dtype=torch.bool, device=device)
            logits = reader.step(tokens, most - step - 1)
    longest = int(lengths.max())
    return Decoded(ids[:, :longest], logprobs[:, :longest], lengths)


def _stop_tables(size: int, stop_ids: Sequence[int], late_stop_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Whether each of ``size`` tokens ends a response anywhere, and whether it ends one from ``stop_after`` on."""
    anywhere = torch.zeros(size, dtype=torch.bool)
    anywhere[[token for token in stop_ids if token < size]] = True  # a tokenizer may have more tokens than the model has rows
    late = anywhere.clone()
    late[[token for token in late_stop_ids if token < size]] = True
    return anywhere.to(device), late.to(device)

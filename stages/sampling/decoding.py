"""Decoding one batch token by token: a cache that is written in place, rows that leave once they have ended, one prefill per prompt.

B sequences, P prompt tokens (left padded), H key-value heads, D their width. A step costs one forward pass of the model and a handful of
operations on [B] tensors; nothing is copied that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.config import GenerationSettings
from stages.numerics.passes import passes
from stages.numerics.sampling import sample_tokens
from stages.sampling.cache import decoding_attention, forward_options, keep_rows, make_cache, prompt_cache, put_prompts
from stages.sampling.graphs import StepRecorder

COMPACT_BELOW = 0.75  # the cache is copied without its finished rows once fewer than this share of its rows are alive
PROMPT_TOKENS = 16_384  # of one pass over prompts: fills a GPU, and bounds its activations
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
    stop_ids: Sequence[int],
    late_stop_ids: Sequence[int],
    pad_token_id: int,
) -> Decoded:
    """One response for each entry of ``rows`` [B]: the number of its prompt in ``prompt_ids``, ``prompt_mask`` [prompts, P].

    A prompt is read once, however many of the rows want it. ``noise`` [B, max_new_tokens] uniform in [0, 1).
    """
    device, most = prompt_ids.device, settings.max_new_tokens
    stop_anywhere, stop_late = _stop_tables(model, stop_ids, late_stop_ids, device)
    cache, whole = make_cache(model, most)
    logits = read_prompts(model, cache, whole, prompt_ids, prompt_mask)
    positions, mask, number = prompt_mask.long().sum(dim=1, keepdim=True), prompt_mask, len(rows)
    if not torch.equal(rows, torch.arange(len(prompt_ids), device=device)):
        logits, positions, mask = logits[rows], positions[rows], mask[rows]
        keep_rows(cache, rows, 0)

    ids = torch.full((number, most), pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros((number, most), device=device)
    lengths = torch.zeros(number, dtype=torch.long, device=device)
    alive = torch.arange(number, device=device)  # row of the batch -> row of the result
    running = torch.ones(number, dtype=torch.bool, device=device)  # by row of the batch
    columns = torch.nn.functional.pad(mask, (0, most), value=True)  # which columns of the cache count, at any step
    width = mask.shape[1]
    bias = _attention_bias(columns, logits.dtype)
    options = forward_options(model, cache)
    recorder = StepRecorder(model, cache, enabled=whole and settings.cuda_graphs)
    check_every = CUDA_CHECK_EVERY if device.type == "cuda" else 1
    with decoding_attention(model, cache):
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
                    # Columns that are padding for every row that is left go, too.
                    first = int(columns[kept].long().argmax(dim=1).min()) if whole else 0
                    tokens, positions, columns, alive = tokens[kept], positions[kept], columns[kept][:, first:], alive[kept]
                    width -= first
                    bias = _attention_bias(columns, logits.dtype)
                    recorder.release()
                    keep_rows(cache, kept, first)
                    running = torch.ones(len(kept), dtype=torch.bool, device=device)
            found = recorder(tokens, positions, bias, most - step - 1)
            width += 1
            if found is None:
                step_mask = columns[:, :width].long() if not whole else None if bias is None else bias[..., :width]
                found = model(input_ids=tokens[:, None], attention_mask=step_mask, position_ids=positions, **options).logits[:, -1]
            logits, positions = found, positions + 1
    longest = int(lengths.max())
    return Decoded(ids[:, :longest], logprobs[:, :longest], lengths)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: what makes left padding invisible to the model. Mask [B, T]; returns [B, T]."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def read_prompts(model: Any, cache: Any, whole: bool, ids: Tensor, mask: Tensor) -> Tensor:
    """Fill ``cache`` with the prompts [prompts, P]; returns the logits of the token after each [prompts, V].

    Where the cache allows it, neighbours are read together as long as they fit into one pass, without the padding that all of them have:
    ``generate`` gives prompts in order of length.
    """
    number, width = ids.shape
    positions = position_ids(mask)
    if not whole:
        output = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, **forward_options(model, cache))
        return output.logits[:, -1]
    lengths, kind = mask.sum(dim=1).tolist(), ids.device.type
    logits = []
    for rows in passes(range(number), lengths, rows=max(1, PROMPT_TOKENS // width), device_type=kind):
        part = (slice(rows[0], rows[-1] + 1), slice(width - max(lengths[row] for row in rows), width))
        read = prompt_cache(cache)
        output = model(input_ids=ids[part], attention_mask=mask[part].long(), position_ids=positions[part], **forward_options(model, read))
        put_prompts(cache, read, rows[0], number, width)
        logits.append(output.logits[:, -1])
    return torch.cat(logits)


def _attention_bias(columns: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to a new token's attention scores [B, 1, 1, columns]; None where no column is padding.

    Numbers and not truth values: of those every layer would make numbers again.
    """
    if bool(columns.all()):
        return None
    return torch.zeros(columns.shape, dtype=dtype, device=columns.device).masked_fill_(~columns, -torch.inf)[:, None, None]


def _stop_tables(model: Any, stop_ids: Sequence[int], late_stop_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Whether each token [V] ends a response anywhere, and whether it ends one from ``stop_after`` on."""
    size = model.get_output_embeddings().weight.shape[0]
    anywhere = torch.zeros(size, dtype=torch.bool)
    anywhere[[token for token in stop_ids if token < size]] = True  # a tokenizer may have more tokens than the model has rows
    late = anywhere.clone()
    late[[token for token in late_stop_ids if token < size]] = True
    return anywhere.to(device), late.to(device)

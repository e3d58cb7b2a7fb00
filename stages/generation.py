"""Sampling completions: left padding, a KV cache, stop tokens, the response mask, and the log-probability of every sampled token.

B sequences, P prompt tokens (left padded), R response tokens (right padded), V vocabulary. Every sequence draws from a random stream of its
own, so a completion depends on its seed and its prompt and not on which others share its batch. Rows that have stopped leave the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.config import GenerationSettings
from stages.errors import ModelError
from stages.numerics.logprobs import token_logprobs

COMPACT_BELOW = 0.75  # the cache is copied without its finished rows once fewer than this share of its rows are alive


@dataclass(frozen=True)
class Generated:
    """Prompts and their completions.

    prompt_ids, prompt_mask [B, P] left padded; response_ids, response_mask, logprobs [B, R] right padded. The mask is True through the stop
    token. ``logprobs`` are those of the sampled tokens at the sampling temperature (at 1 for greedy), before top-k and top-p.
    ``stopped`` [B]: whether the completion ended with a stop token.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    stopped: Tensor

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each row [B], the stop token among them."""
        return self.response_mask.sum(dim=1)


def stop_token_ids(model: Any, tokenizer: Any, stop: Iterable[str] = ()) -> list[int]:
    """Tokens that end a completion: the tokenizer's eos, the model's own (generation config), and ``stop`` (each must be one token)."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is not None:
        ids.update(own if isinstance(own, list) else [own])
    for text in stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id and text != tokenizer.unk_token:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(found) != 1:
                raise ModelError(f"generation.stop: {text!r} is {len(found)} tokens of this tokenizer; a stop token must be exactly one")
            token = found[0]
        ids.add(token)
    return sorted(ids)


def ending_tokens(model: Any, tokenizer: Any, settings: GenerationSettings) -> tuple[list[int], list[int]]:
    """(tokens that end a completion anywhere, tokens that end it from position ``stop_after`` on), as ``generate`` wants them."""
    usual = stop_token_ids(model, tokenizer)
    named = stop_token_ids(model, tokenizer, settings.stop)
    if not settings.ignore_eos:
        return usual, [token for token in named if token not in usual]
    own = {tokenizer.convert_tokens_to_ids(text) for text in settings.stop}
    return [], [token for token in named if token not in usual or token in own]


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token rows as (ids, mask), both [B, P]. Left, because generation goes on from the last column."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = True
    return ids.to(device), mask.to(device)


def right_pad(rows: Sequence[Tensor], value: float, width: int | None = None) -> Tensor:
    """Rows of any length as one tensor [B, width], filled up on the right with ``value``."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    missing = 0 if width is None else width - padded.shape[1]
    return torch.nn.functional.pad(padded, (0, missing), value=value) if missing > 0 else padded


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: what makes left padding invisible to the model. Mask [B, T]; returns [B, T]."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    pad_token_id: int,
    late_stop_ids: Sequence[int] = (),
) -> Generated:
    """Sample one completion for each prompt (token ids); ``seeds`` has one number per prompt.

    ``stop_ids`` end a completion anywhere, ``late_stop_ids`` from response position ``settings.stop_after`` on (the papers' truncate_token
    and truncate_after).

    Batches of ``settings.batch_size`` are made of prompts of like length. The model's mode (training or not) is left as it was.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    # The noise of each row is drawn whole and up front: one generator per row, no work per token.
    noise = torch.stack([_uniform(seed, settings.max_new_tokens) for seed in seeds])
    responses: list[Tensor] = [torch.empty(0)] * len(prompts)
    logprobs: list[Tensor] = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    try:
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            batch = _decode([prompts[row] for row in rows], model, settings, noise[rows].to(device), stop_ids, late_stop_ids, pad_token_id)
            for row, (ids, probabilities) in zip(rows, batch, strict=True):
                responses[row], logprobs[row] = ids, probabilities
    finally:
        model.train(training)
    prompt_ids, prompt_mask = left_pad(prompts, pad_token_id, device)
    lengths = torch.tensor([len(row) for row in responses], device=device)
    response_ids = right_pad(responses, pad_token_id)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    late_stops = torch.tensor(list(late_stop_ids), dtype=torch.long, device=device)
    last = torch.stack([row[-1] for row in responses])
    stopped = torch.isin(last, stops) | (torch.isin(last, late_stops) & (lengths > settings.stop_after))
    return Generated(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=torch.arange(response_ids.shape[1], device=device) < lengths[:, None],
        logprobs=right_pad(logprobs, 0.0),
        stopped=stopped,
    )


def episode_seed(seed: int, *place: int) -> int:
    """A number for one episode's random stream that depends on nothing else: not on the process, not on the batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *place)).encode(), digest_size=7).digest(), "big")


def _uniform(seed: int, number: int) -> Tensor:
    """Uniform draws in (0, 1), double precision: a sampled token may be one in a million."""
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _decode(
    prompts: list[Sequence[int]],
    model: Any,
    settings: GenerationSettings,
    noise: Tensor,
    stop_ids: Sequence[int],
    late_stop_ids: Sequence[int],
    pad_token_id: int,
) -> list[tuple[Tensor, Tensor]]:
    """(response ids, logprobs) of each prompt of one batch."""
    from transformers import DynamicCache

    device = noise.device
    ids, mask = left_pad(prompts, pad_token_id, device)
    positions = position_ids(mask)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    all_stops = torch.tensor([*stop_ids, *late_stop_ids], dtype=torch.long, device=device)
    number = len(prompts)
    alive = torch.arange(number, device=device)  # batch row -> prompt
    running = torch.ones(number, dtype=torch.bool, device=device)  # by batch row
    response = torch.full((number, settings.max_new_tokens), pad_token_id, dtype=torch.long, device=device)
    chosen_logprobs = torch.zeros((number, settings.max_new_tokens), device=device)
    lengths = torch.zeros(number, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    for step in range(settings.max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1].float()
        tokens = _choose(logits, settings, noise[alive, step])
        probabilities = token_logprobs(logits, tokens, temperature=settings.temperature or 1.0)
        rows = alive[running]
        response[rows, step] = tokens[running]
        chosen_logprobs[rows, step] = probabilities[running]
        lengths[rows] = step + 1
        running = running & ~torch.isin(tokens, all_stops if step >= settings.stop_after else stops)
        num_running = int(running.sum())
        if num_running == 0:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if num_running < COMPACT_BELOW * len(alive):
            kept = torch.nonzero(running).squeeze(1)
            # Columns that are padding for every row that is left go, too.
            first = int(mask[kept].long().argmax(dim=1).min())
            ids, positions, mask, alive = ids[kept], positions[kept], mask[kept][:, first:], alive[kept]
            _keep_rows(cache, kept, first)
            running = torch.ones(len(kept), dtype=torch.bool, device=device)
    counts = lengths.tolist()
    return [(response[row, :count], chosen_logprobs[row, :count]) for row, count in enumerate(counts)]


def _keep_rows(cache: Any, rows: Tensor, first_column: int) -> None:
    """Keep only ``rows`` of the cache, without the columns before ``first_column``."""
    for layer in cache.layers:
        # A layer with a sliding window has its own idea of columns; only whole caches are cut.
        start = first_column if type(layer).__name__ == "DynamicLayer" else 0
        layer.keys = layer.keys[rows, :, start:]
        layer.values = layer.values[rows, :, start:]


def _choose(logits: Tensor, settings: GenerationSettings, noise: Tensor) -> Tensor:
    """Next tokens [B] for logits [B, V] by inverting the cumulative distribution at ``noise`` [B]; the likeliest at temperature 0."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_k:
        threshold = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if settings.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token goes when those before it already hold top_p; the likeliest always stays.
        drop = probabilities.cumsum(dim=-1) - probabilities >= settings.top_p
        logits = logits.masked_fill(drop.scatter(-1, places, drop), -torch.inf)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = noise[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def decode_completions(tokenizer: Any, generated: Generated) -> list[str]:
    """Completions as text, without the stop token and other special tokens, and without white space at the ends."""
    rows = [ids[mask].tolist() for ids, mask in zip(generated.response_ids.cpu(), generated.response_mask.cpu(), strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

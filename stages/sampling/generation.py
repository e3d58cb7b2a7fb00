"""Sampling completions: left padding, a KV cache, stop tokens, the response mask, and the log-probability of every sampled token.

B sequences, P prompt tokens (left padded), R response tokens (right padded), V vocabulary. Every sequence has its own random stream. So a
completion depends on its seed and its prompt, and not on the other sequences in its batch.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stages.config import GenerationSettings
from stages.errors import ModelError
from stages.sampling.cache import without_cudnn_attention
from stages.sampling.continuous import SlotDecoder
from stages.sampling.decoding import Decoded, Request, decode
from stages.sampling.padding import left_pad, right_pad
from stages.sampling.probe import fits_slots, usable_support
from stages.sampling.retreats import RowLimit, row_limit
from stages.sampling.support import DecodingSupport, plain_model
from stages.sampling.workspace import workspace_for
from stages.tokens.continuation import CONTEXT, continuation_text, segment_ids
from stages.tokens.positions import frequency_switch, model_length
from stages.tokens.turns import turn_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)
ADVICE = (
    "Lower generation.max_new_tokens, leave out long prompts, quantize the model (quantization: nf4), or use a smaller one; PPO: set "
    "offload: true"
)
ONLY_ROUNDING = "Every completion has its own random numbers, so only rounding depends on this"
_said: set[str] = set()  # model classes for which the log already says that they are decoded batch by batch


@dataclass(frozen=True)
class Generated:
    """Prompts and their completions.

    prompt_ids, prompt_mask [B, P] are left padded; response_ids, response_mask, logprobs [B, R] are right padded. ``response_mask`` is True
    up to and including the stop token. ``logprobs``: log-probabilities of the sampled tokens at the sampling temperature (at temperature 1
    for greedy decoding), before top-k and top-p. ``stopped`` [B]: whether the completion ended with a stop token.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    stopped: Tensor

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each row [B], including the stop token."""
        return self.response_mask.sum(dim=1)

    def cpu(self) -> Generated:
        """The same on the CPU, so that reading single rows does not wait for a GPU each time."""
        return Generated(**{part.name: getattr(self, part.name).cpu() for part in fields(self)})


@dataclass(frozen=True)
class Finished:
    """A finished completion. Other completions of the same call may still be running.

    ``row``: row index of its prompt. ``response_ids``: its tokens, including the stop token if there is one. ``logprobs``: their
    log-probabilities, as in ``Generated``. ``stopped``: whether it ended with a stop token.
    """

    row: int
    response_ids: list[int]
    logprobs: list[float]
    stopped: bool


OnFinished = Callable[[list[Finished]], None]


class StopTokens(NamedTuple):
    """Token ids that end a completion: ``anywhere`` at every position, ``late`` from position ``stop_after`` of the settings on."""

    anywhere: list[int]
    late: list[int]


def stop_token_ids(model: TransformersModel, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = ()) -> list[int]:
    """The ids of the tokens that end a completion, sorted.

    They are the tokenizer's eos token, the eos tokens of the model's generation config, and the token that ends an assistant turn in the
    chat template. The tokens of the texts ``stop`` are added. Raises ModelError if a text of ``stop`` is not exactly one token.
    """
    ids: set[int] = set(turn_end_ids(tokenizer))
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is not None:
        ids.update(own if isinstance(own, list) else [own])
    for text in stop:
        token = tokenizer.convert_tokens_to_ids(text)
        assert not isinstance(token, list)  # ``text`` is one token
        if token is None or token == tokenizer.unk_token_id and text != tokenizer.unk_token:
            tokens = segment_ids(tokenizer, ["a", text])[1]  # as in a completion: SentencePiece puts a space before a text alone
            if len(tokens) != 1:
                raise ModelError(f"generation.stop: {text!r} is {len(tokens)} tokens of this tokenizer; a stop token must be exactly one")
            token = tokens[0]
        ids.add(token)
    return sorted(ids)


def ending_tokens(model: TransformersModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> StopTokens:
    """The stop tokens of ``settings``. Raises ModelError like ``stop_token_ids``."""
    usual = stop_token_ids(model, tokenizer)
    named = stop_token_ids(model, tokenizer, settings.stop)
    if not settings.ignore_eos:
        return StopTokens(usual, [token for token in named if token not in usual])
    own = {tokenizer.convert_tokens_to_ids(text) for text in settings.stop}
    return StopTokens([], [token for token in named if token not in usual or token in own])


def require_room(model: TransformersModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    """Raise ModelError if a prompt (token ids) plus ``settings.max_new_tokens`` needs more positions than ``model`` has.

    Raises it also if a completion may grow past the length above which the model uses other frequencies.
    """
    _refuse_switch(model, prompts, settings)
    positions = model_length(model.config)
    if positions is None:
        return
    room = positions - settings.max_new_tokens
    too_long = [len(prompt) for prompt in prompts if len(prompt) > room]
    if too_long:
        raise ModelError(
            f"{len(too_long)} of {len(prompts)} prompts are too long: the longest has {max(too_long)} tokens, and the model "
            f"has {positions} positions, of which generation.max_new_tokens={settings.max_new_tokens} leaves {max(room, 0)}. "
            "Leave out or shorten long prompts, or lower max_new_tokens"
        )


def _refuse_switch(model: TransformersModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    """Raise ModelError if a completion may cross the length of ``frequency_switch``: the cached keys have the frequencies of before."""
    switch, new = frequency_switch(model.config), settings.max_new_tokens
    crossing = [len(prompt) for prompt in prompts if switch is not None and len(prompt) <= switch < len(prompt) + new]
    if crossing:
        raise ModelError(
            f"{len(crossing)} of {len(prompts)} prompts, e.g. one of {max(crossing)} tokens, may get a completion that crosses {switch} "
            f"tokens, where this model changes its frequencies (longrope). Prompt and completion (generation.max_new_tokens={new}) must "
            f"both be below it, or the prompt above it. Keep prompts of at most {max(0, (switch or 0) - new)} tokens, e.g. by "
            "max_prompt_tokens, or lower max_new_tokens"
        )


@torch.no_grad()
def generate(
    model: TransformersModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    pad_token_id: int,
    late_stop_ids: Sequence[int] = (),
    on_finished: OnFinished | None = None,
) -> Generated:
    """Sample one completion for each prompt (token ids). ``seeds`` has one random seed per prompt.

    ``stop_ids`` end a completion at every position; ``late_stop_ids`` end it from response position ``settings.stop_after`` on (the papers'
    truncate_token and truncate_after).

    ``settings.batch_size`` prompts of similar length are decoded together. If the model cannot hide padding, their lengths must be equal.
    With continuous batching a waiting prompt replaces a completion that has ended. The function restores the model's training mode.

    ``on_finished`` gets every completion once, soon after it has ended, while others are still running. It must return quickly and must not
    use ``model``. An exception in it ends the sampling.

    If memory runs out, the unfinished completions start again with half as many decoded together. Only rounding depends on that number.

    Raises ValueError if the counts of prompts and seeds differ. Raises ModelError if a prompt leaves too few positions for
    ``settings.max_new_tokens``, if the model is not causal, or if its logits are not finite. Raises MemoryExhausted if a single completion
    does not fit into memory.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
    require_room(model, prompts, settings)
    # All random numbers of a row are drawn in advance, with one generator per row.
    noise, device = torch.stack([_uniform(seed, settings.max_new_tokens) for seed in seeds]), next(model.parameters()).device
    request = Request(prompts, settings, noise, stop_ids, late_stop_ids, pad_token_id)
    made = _Collected(request, on_finished)
    # Sorting puts equal prompts next to each other, so a batch reads them once.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]))
    training = model.training
    model.eval()
    try:
        with without_cudnn_attention(device.type):
            support = usable_support(model)
            decode_rows = _decode_in_slots if decodes_in_slots(model, support, settings, prompts) else _decode_in_batches
            limit = row_limit(plain_model(model), "sampling", ADVICE, ONLY_ROUNDING)
            while waiting := made.missing(order):
                chosen = _fitting(settings, limit, len(waiting))
                try:
                    decode_rows(model, support, replace(request, settings=chosen, noise=noise.to(device)), waiting, made.take)
                except Exception as error:
                    limit.retreat(error, chosen.batch_size)
                else:
                    limit.succeeded()
                    continue
                limit.release()
    finally:
        model.train(training)
    generated = made.generated()
    _refuse_nan(model, generated)
    return generated


def _refuse_nan(model: TransformersModel, generated: Generated) -> None:
    """Raise ModelError if a log-probability is not finite: the tokens are then arbitrary. On a GPU this makes the CPU wait once."""
    bad = int((~generated.logprobs.isfinite()).any(dim=1).sum())
    if bad:
        raise ModelError(
            f"{type(plain_model(model)).__name__} computed logits that are not finite for {bad} of {len(generated.logprobs)} completions, "
            "so their tokens would be arbitrary. Use precision: bf16 or fp32 (fp16 overflows above 65,504), or check the weights"
        )


def _fitting(settings: GenerationSettings, limit: RowLimit, number: int) -> GenerationSettings:
    """``settings`` for ``number`` prompts, with as many sequences decoded together as memory allows.

    The last attempt, with one sequence, has no recorded steps, because they take memory.
    """
    changes: dict[str, object] = {"batch_size": limit.within(min(settings.batch_size, number))}
    if limit.last_attempt.begun:
        changes["cuda_graphs"] = False
    return settings.model_copy(update=changes)


def joined(prompts: Sequence[Sequence[int]], finished: Sequence[Finished], pad_token_id: int) -> Generated:
    """The completions of ``prompts`` (token ids), one for each prompt and in their order, as tensors on the CPU."""
    responses = [torch.tensor(one.response_ids) for one in finished]
    logprobs = [torch.tensor(one.logprobs) for one in finished]
    return _padded(prompts, responses, logprobs, torch.tensor([one.stopped for one in finished]), pad_token_id)


def _padded(
    prompts: Sequence[Sequence[int]], responses: Sequence[Tensor], logprobs: Sequence[Tensor], stopped: Tensor, pad_token_id: int
) -> Generated:
    device = stopped.device
    prompt_ids, prompt_mask = left_pad(prompts, pad_token_id, device)
    response_ids = right_pad(responses, pad_token_id)
    response_mask = torch.arange(response_ids.shape[1], device=device) < _lengths(responses)[:, None]
    return Generated(prompt_ids, prompt_mask, response_ids, response_mask, right_pad(logprobs, 0.0), stopped)


def _lengths(responses: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(response) for response in responses], device=responses[0].device)


class _Collected:
    """Collects the finished completions of a request."""

    def __init__(self, request: Request, on_finished: OnFinished | None) -> None:
        self._request, self._on_finished = request, on_finished
        self._responses: list[Tensor] = [torch.empty(0)] * len(request.prompts)
        self._logprobs: list[Tensor] = [torch.empty(0)] * len(request.prompts)

    def take(self, made: Decoded) -> None:
        """Store finished responses; ``made.rows`` are the row indices of their prompts. Calls ``on_finished``."""
        for index, (row, length) in enumerate(zip(made.rows, made.lengths, strict=True)):
            self._responses[row], self._logprobs[row] = made.ids[index, :length], made.logprobs[index, :length]
        if self._on_finished is not None:
            responses = [ids[:length] for ids, length in zip(made.ids.tolist(), made.lengths, strict=True)]
            stopped = self._stopped([self._responses[row] for row in made.rows]).tolist()
            logprobs = [values[:length] for values, length in zip(made.logprobs.tolist(), made.lengths, strict=True)]
            self._on_finished([Finished(*parts) for parts in zip(made.rows, responses, logprobs, stopped, strict=True)])

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of ``rows`` that have no completion yet."""
        return [row for row in rows if not len(self._responses[row])]

    def generated(self) -> Generated:
        """All completions, in the order of their prompts."""
        request, stopped = self._request, self._stopped(self._responses)
        return _padded(request.prompts, self._responses, self._logprobs, stopped, request.pad_token_id)

    def _stopped(self, responses: Sequence[Tensor]) -> Tensor:
        """Whether each response ends with a stop token [B]."""
        request, last = self._request, torch.stack([response[-1] for response in responses])
        stops, late_stops = (
            torch.tensor(list(ids), dtype=torch.long, device=last.device) for ids in (request.stop_ids, request.late_stop_ids)
        )
        return torch.isin(last, stops) | (torch.isin(last, late_stops) & (_lengths(responses) > request.settings.stop_after))


def decodes_in_slots(
    model: TransformersModel, support: DecodingSupport, settings: GenerationSettings, prompts: Sequence[Sequence[int]]
) -> bool:
    """Whether ``prompts`` are decoded in slots instead of batch by batch. Continuous batching and CUDA graphs need slots.

    Slots are used on a GPU. On a CPU they are used only if the settings ask for continuous batching and there are more prompts than
    ``batch_size``. If the model's cache cannot give a row to another sequence, decoding is batch by batch; the log says so once.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    waits = len(prompts) > settings.batch_size and settings.continuous_batching is not False
    if not (on_gpu or (waits and settings.continuous_batching is True)):
        return False
    tokens = max(map(len, prompts)) + settings.max_new_tokens
    fits = fits_slots(model, support, tokens)
    if waits and not fits:
        _say_batch_by_batch(type(plain_model(model)).__name__, 0 if tokens <= support.slot_tokens else int(support.slot_tokens), tokens)
    return fits


def _say_batch_by_batch(name: str, window: int, tokens: int) -> None:
    if name not in _said:
        _said.add(name)
        reason = (
            f"its attention looks back over {window} tokens, and a prompt and its completion have up to {tokens}"
            if window
            else "its cache cannot give the slot of a finished completion to another one"
        )
        logger.warning("%s is decoded batch by batch: %s", name, reason)


def _decode_in_slots(
    model: TransformersModel, support: DecodingSupport, request: Request, order: Sequence[int], report: Callable[[Decoded], None]
) -> None:
    """Decode the rows ``order`` in the slots of one workspace."""
    settings = request.settings
    longest = max(len(request.prompts[row]) for row in order)
    with workspace_for(model, settings.batch_size, longest, settings.max_new_tokens, cuda_graphs=settings.cuda_graphs) as workspace:
        SlotDecoder(model, support, workspace, request).run(order, report)


def _decode_in_batches(
    model: TransformersModel, support: DecodingSupport, request: Request, order: Sequence[int], report: Callable[[Decoded], None]
) -> None:
    """Decode the rows ``order``, one batch after another."""
    lengths = [len(prompt) for prompt in request.prompts]
    for rows in _batches(order, lengths, request.settings.batch_size, mixed=support.hides_padding):
        decode(model, support, request, rows, report)


def _batches(order: Sequence[int], lengths: Sequence[int], batch_size: int, *, mixed: bool) -> list[list[int]]:
    """Split the row indices ``order`` (sorted by length) into batches of ``batch_size``.

    ``mixed``: whether rows of different lengths may share a batch.
    """
    alike = [list(order)] if mixed else [list(rows) for _, rows in itertools.groupby(order, key=lambda row: lengths[row])]
    return [rows[start : start + batch_size] for rows in alike for start in range(0, len(rows), batch_size)]


def episode_seed(seed: int, *numbers: int) -> int:
    """A random seed for one episode, derived from ``seed`` and ``numbers`` only. It does not depend on the process or the batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=7).digest(), "big")


def _uniform(seed: int, number: int) -> Tensor:
    """``number`` uniform random numbers in [0, 1). Double precision, because a sampled token may have a probability of one in a million."""
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decode_completions(tokenizer: PreTrainedTokenizerBase, generated: Generated) -> list[str]:
    """The text of every completion (see ``completion_text``)."""
    responses = zip(generated.response_ids.cpu(), generated.response_mask.cpu(), strict=True)
    prompts = zip(generated.prompt_ids[:, -CONTEXT:].cpu(), generated.prompt_mask[:, -CONTEXT:].cpu().bool(), strict=True)
    return [
        completion_text(tokenizer, prompt[shown].tolist(), response[counts].tolist())
        for (response, counts), (prompt, shown) in zip(responses, prompts, strict=True)
    ]


def completion_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """A completion as text, without the end-of-turn token, other special tokens, and white space at both ends.

    It is decoded as the continuation of its prompt, because some tokenizers decode a word differently at the beginning of a text.
    """
    ids = list(response_ids)
    # A chat template may end turns with a token that the tokenizer does not mark as special.
    if ids and ids[-1] in turn_end_ids(tokenizer):
        ids = ids[:-1]
    return continuation_text(tokenizer, list(prompt_ids[-CONTEXT:]), ids).strip()

"""Tests whether a decoding method gives correct logits for a model, by comparison with plain forward passes.

The test decodes a few tokens and compares their logits with those of one plain forward pass per row. Some model classes do not show which
method is correct: recurrent states, caches with several kinds of layers, no position ids, code that comes with the model. Such a model is
tested once before its first batch. If the test fails, a slower correct method is used, and the log says so.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stages.errors import ModelError, is_out_of_memory
from stages.sampling.readers import make_reader
from stages.sampling.support import (
    PASS_FAILURES,
    DecodingSupport,
    decoding_support,
    family_of,
    no_cache,
    plain_model,
    says_causal,
    weight_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)
_found: WeakKeyDictionary[PreTrainedModel, tuple[DecodingSupport, DecodingSupport]] = (
    WeakKeyDictionary()
)  # (requested support, correct support)
_fitting: WeakKeyDictionary[PreTrainedModel, tuple[DecodingSupport, bool]] = WeakKeyDictionary()  # (requested support, whether slots work)
_said: set[str] = set()

LENGTHS = (3, 7)  # tokens of the two test prompts
STEPS = 2  # tokens after each prompt
TOLERANCE = 1e-2  # share of the logits' spread: far above fp32 rounding, far below the effect of a wrong position
LOW_PRECISION_TOLERANCE = 0.3  # the same for half precision and quantized weights, whose rounding errors are large


@torch.no_grad()
def usable_support(model: TransformersModel) -> DecodingSupport:
    """The fastest correct decoding method for ``model``. It is tested if the model's class does not show that it is correct.

    Raises ModelError if no method is correct: the model is not causal, so it cannot generate token by token.
    """
    support, plain = decoding_support(model), plain_model(model)
    is_clear = support.adds_mask and family_of(plain).__module__.startswith("transformers.") and says_causal(plain)
    if is_clear:
        return support
    asked, usable = _found.get(plain, (None, support))
    if asked != support:
        usable = _tried_out(model, support)
        _found[plain] = (support, usable)
    return usable


@torch.no_grad()
def fits_slots(model: TransformersModel, support: DecodingSupport, tokens: int) -> bool:
    """Whether sequences of up to ``tokens`` tokens can be decoded in slots.

    Slots use one additive attention mask for all layers and a cache without sliding windows. A model with sliding windows fits if no
    sequence is longer than its window. That is tested once.
    """
    if tokens > support.slot_tokens:
        return False
    if support.adds_mask:
        return True
    plain = plain_model(model)
    asked, fits = _fitting.get(plain, (None, False))
    if asked != support:
        fits = _problem(model, replace(support, adds_mask=True)) is None
        _fitting[plain] = (support, fits)
    return fits


def _tried_out(model: TransformersModel, support: DecodingSupport) -> DecodingSupport:
    name, reason = type(plain_model(model)).__name__, ""
    for way, what in _ways(support):
        problem = _problem(model, way)
        if problem is None:
            if reason and name not in _said:
                _said.add(name)
                logger.warning("%s is decoded %s: %s", name, what, reason)
            return way
        reason = reason or problem
    raise ModelError(
        f"{name} cannot generate token by token: {reason}. Expected a causal language model: its logits depend on earlier tokens only"
    )


def _ways(support: DecodingSupport) -> list[tuple[DecodingSupport, str]]:
    """``support`` and the slower methods that require less of the model, from fast to slow, each with a phrase for the log."""
    equal = replace(support, hides_padding=False, adds_mask=False, slot_tokens=0)
    ways = {
        support: "with the method of its model class",
        equal: "in batches of equal length",
        without_cache(support): "without a cache, which is slow",
    }
    return list(ways.items())


def without_cache(support: DecodingSupport) -> DecodingSupport:
    """The method that reads the full text at every step. It is correct for every causal model."""
    return replace(support, cache_name=None, hides_padding=False, adds_mask=False, slot_tokens=0)


def _problem(model: TransformersModel, support: DecodingSupport) -> str | None:
    """What is wrong with this decoding method; None if its logits agree with those of plain forward passes."""
    lengths = LENGTHS if support.hides_padding else (LENGTHS[1],) * 2
    rows = _texts(model, [length + STEPS for length in lengths])
    try:
        actual = _read(model, support, rows, lengths)
    except PASS_FAILURES as error:
        if is_out_of_memory(error):
            raise
        return f"its forward pass fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    expected = torch.stack(
        [model(input_ids=row[None], **no_cache(model)).logits[0, length - 1 :].float() for row, length in zip(rows, lengths, strict=True)]
    )  # [2, 1 + STEPS, V]
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    difference = float((actual - expected).norm() / spread.clamp(min=torch.finfo(torch.float32).tiny))
    device = rows[0].device.type
    fp32 = model.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    if difference <= (TOLERANCE if fp32 else LOW_PRECISION_TOLERANCE):
        return None
    return f"its logits would differ by {difference:.0%} of their spread from those of a plain forward pass"


def _texts(model: TransformersModel, lengths: list[int]) -> list[Tensor]:
    """Test texts of ``lengths`` tokens. The tokens are spread over the vocabulary; the pad token is left out."""
    embedding = weight_of(plain_model(model).get_input_embeddings())
    size, pad = embedding.shape[0], getattr(model.config, "pad_token_id", None)
    tokens = [token for token in range(size) if token != pad]
    step = max(1, len(tokens) // sum(lengths))
    drawn = iter(tokens[index * step % len(tokens)] for index in range(sum(lengths)))
    return [torch.tensor([next(drawn) for _ in range(length)], device=embedding.device) for length in lengths]


def _read(model: TransformersModel, support: DecodingSupport, rows: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """Logits after the prompt and after each further token [2, 1 + STEPS, V] fp32. The two rows are swapped before every step."""
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row[:length], (width - length, 0)) for row, length in zip(rows, lengths, strict=True)])
    mask = torch.stack([torch.arange(width, device=ids.device) >= width - length for length in lengths])
    reader = make_reader(model, support, STEPS)
    logits, order = [reader.read(ids, mask)], torch.tensor([0, 1], device=ids.device)
    with reader.stepping():
        for step in range(STEPS):
            swap = torch.tensor([1, 0], device=ids.device)
            reader.keep(swap, trim=True)
            order = order[swap]
            tokens = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])
            logits.append(reader.step(tokens[order])[order])
    return torch.stack(logits, dim=1).float()

"""What a model's class says about decoding: whether it has a cache, and whether its rows may be padded on the left.

The questions go to transformers (signatures, class attributes, layers of the cache), so that a family needs no entry in a list.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ADDED_MASK = ("eager", "sdpa")  # attention implementations that add a given 4-D mask to the scores


@dataclass(frozen=True)
class DecodingSupport:
    """How a model can be decoded.

    cache_name: the argument of the forward pass that takes the cache; None where the model has no cache of transformers' kind, so that
    every step reads the whole text again.
    hides_padding: whether a 2-D attention mask (with position ids, where the model has positions) makes left padding invisible. Where it
    does not, a batch holds prompts of one length only.
    takes_mask, takes_positions, takes_use_cache: whether the forward pass has ``attention_mask``, ``position_ids``, ``use_cache``.
    masks_steps: whether a pass over one new token wants the mask. A model with states alone has nothing to mask in it.
    adds_mask: whether the model adds a given 4-D mask to its attention scores and looks back without limit. Then the cache may be
    written in place.
    limits_logits: whether the forward pass can give the logits of the last token alone.
    slot_tokens: the most tokens of a sequence for which a row of the cache can be given to another sequence: 0 where it never can, the
    sliding window where layers look back no further, else without limit.
    """

    cache_name: str | None
    hides_padding: bool
    takes_mask: bool
    takes_positions: bool
    takes_use_cache: bool
    masks_steps: bool
    adds_mask: bool
    limits_logits: bool
    slot_tokens: float


def decoding_support(model: Any) -> DecodingSupport:
    """Ask the class and the config of ``model``, a causal language model with or without an adapter of peft."""
    plain = plain_model(model)
    parameters = inspect.signature(family_of(plain).forward).parameters
    # transformers is renaming past_key_values to cache
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    has_options = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    layers = _cache_layers(plain) if name is not None and not _numbers_tokens_itself(plain) else None
    if layers is None:
        name = None
    takes_mask, takes_positions = "attention_mask" in parameters, "position_ids" in parameters
    has_states_alone = bool(layers) and not any(hasattr(layer, "get_seq_length") for layer in layers or ())
    hides_padding = (
        name is not None
        and takes_mask
        and (has_states_alone or takes_positions or _attends_by_distance(plain))
        and all(_skips_padding(plain, layer) for layer in layers or ())
    )
    in_place = (
        hides_padding
        and takes_positions
        and bool(getattr(plain, "_supports_attention_backend", False))
        and plain.config._attn_implementation in ADDED_MASK
    )
    slot_tokens = _looks_back(layers or ()) if in_place else 0
    return DecodingSupport(
        cache_name=name,
        hides_padding=hides_padding,
        takes_mask=takes_mask,
        takes_positions=takes_positions,
        takes_use_cache="use_cache" in parameters or has_options,
        masks_steps=not has_states_alone,
        adds_mask=slot_tokens == math.inf,
        limits_logits="logits_to_keep" in parameters,
        slot_tokens=slot_tokens,
    )


def family_of(model: Any) -> Any:
    """The class of ``model``, or the one that it is derived from, whose forward pass names its inputs."""
    classes: list[Any] = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
    return next((kind for kind in classes if "input_ids" in inspect.signature(kind.forward).parameters), type(model))


def plain_model(model: Any) -> Any:
    """``model`` without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def says_causal(model: Any) -> bool:
    """Whether every attention layer of ``model`` says that it is causal; False where none says anything."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    decodes = [module.is_decoder for module in model.modules() if hasattr(module, "is_decoder")]
    return bool(said) and all(said) and all(decodes)


def _cache_layers(model: Any) -> list[Any] | None:
    """The layers of an empty cache for ``model``; None where the model does not work with transformers' cache."""
    supports = getattr(type(model), "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return None
    return list(DynamicCache(config=model.config).layers)


def _looks_back(layers: Sequence[Any]) -> float:
    """The tokens that every one of these layers of a cache looks back over; 0 where one is of another kind, or where there are none."""
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer), default=math.inf)


def _skips_padding(model: Any, layer: Any) -> bool:
    """Whether left padding leaves no trace in a layer of the cache.

    The state of a recurrent layer stays clean only where the family zeroes the inputs of padding. A cache layer of the family's own may
    sum over places, padding among them.
    """
    if hasattr(layer, "recurrent_states"):
        code = sys.modules[family_of(model).__module__]
        return any(hasattr(code, name) for name in ("apply_mask_to_padding_states", "create_recurrent_attention_mask"))
    return type(layer).__module__ == DynamicLayer.__module__


def _attends_by_distance(model: Any) -> bool:
    """Whether ``model`` has ALiBi instead of positions: its bias depends on the distance of two tokens, which padding does not change."""
    return any("alibi" in name for module in model.modules() for name in vars(type(module)))


def _numbers_tokens_itself(model: Any) -> bool:
    """Whether ``model`` computes positions from the tokens, as RoBERTa does: from ``pad_token_id + 1`` on, and none for a pad token.

    A pass over one new token cannot know how many of those before it were pad tokens, so that such a model reads the whole text.
    """
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())

"""Detects how a model can be decoded: for example, whether it has a cache, and whether left padding is allowed.

The answers come from transformers: signatures, class attributes and cache layers. So there is no list of model families.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel

ADDED_MASK = ("eager", "sdpa")  # attention implementations that add a given 4-D mask to the scores


PASS_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError, KeyError, NotImplementedError)
"""What a test pass raises if a model does not support the way in which it is called."""


@dataclass(frozen=True)
class DecodingSupport:
    """How a model can be decoded.

    cache_name: the argument of the forward pass that takes the cache. None if the model does not support transformers' cache; then every
    step reads the full text again.
    hides_padding: whether a 2-D attention mask (with position ids, if the model has positions) makes left padding invisible. If not, all
    prompts of a batch must have the same length.
    takes_mask, takes_positions, takes_use_cache: whether the forward pass has ``attention_mask``, ``position_ids``, ``use_cache``.
    masks_steps: whether a forward pass over one new token needs the mask. A purely recurrent model does not.
    adds_mask: whether the model accepts an additive 4-D attention mask and has no sliding window. Then the cache may be written in place.
    limits_logits: whether the forward pass can compute only the last token's logits.
    slot_tokens: the longest sequence, in tokens, for which a cache row can be given to another sequence. 0: never; the sliding window for
    a model with one; infinity otherwise.
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


def decoding_support(model: TransformersModel) -> DecodingSupport:
    """Detect the decoding support of ``model``, a causal language model with or without a peft adapter, from its class and config."""
    plain = plain_model(model)
    parameters = inspect.signature(family_of(plain).forward).parameters
    # transformers is renaming past_key_values to cache
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    layers = cache_layers(plain) if name is not None and not _numbers_tokens_itself(plain) else None
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
        takes_use_cache=bool(no_cache(plain)),
        masks_steps=not has_states_alone,
        adds_mask=slot_tokens == math.inf,
        limits_logits="logits_to_keep" in parameters,
        slot_tokens=slot_tokens,
    )


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The argument of a forward pass that keeps no keys, values or states: ``use_cache=False``; nothing if the model does not take it.

    A pass that needs no cache should have this argument: some classes cannot make a cache for every config (xLSTM, hybrids without an
    attention layer).
    """
    parameters = inspect.signature(family_of(plain_model(model)).forward).parameters
    has_options = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or has_options else {}


def family_of(model: nn.Module) -> type[nn.Module]:
    """The class in the inheritance chain of ``model`` whose ``forward`` names ``input_ids``; the model's own class if there is none."""
    classes = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module) and "forward" in vars(kind)]
    return next((kind for kind in classes if "input_ids" in inspect.signature(kind.forward).parameters), type(model))


@overload
def plain_model(model: TransformersModel) -> PreTrainedModel: ...
@overload
def plain_model(model: nn.Module) -> nn.Module: ...
def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel. A model without adapters is returned unchanged."""
    return cast("PeftModel", model).get_base_model() if hasattr(model, "get_base_model") else model


def has_int8_layers(model: nn.Module) -> bool:
    """Whether ``model`` has layers in int8 (LLM.int8). Their products search for outliers on the GPU, and the CPU waits for the result."""
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer such as an embedding or an output layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def says_causal(model: nn.Module) -> bool:
    """Whether every attention layer of ``model`` is marked as causal; False if no layer has such a mark."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    decodes = [module.is_decoder for module in model.modules() if hasattr(module, "is_decoder")]
    return bool(said) and all(said) and all(decodes)


def cache_layers(model: TransformersModel) -> list[object] | None:
    """The layers of an empty cache for ``model``; None if the model does not support transformers' cache."""
    supports = getattr(type(model), "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return None
    try:
        return list(DynamicCache(config=model.config).layers)
    except AttributeError:  # BLT, whose config has no number of layers
        return None


def _looks_back(layers: Sequence[object]) -> float:
    """The smallest attention window of the cache layers, in tokens (infinity without sliding windows).

    0 if a layer is neither a full nor a sliding-window attention layer, or if there are no layers.
    """
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer), default=math.inf)


def _skips_padding(model: TransformersModel, layer: object) -> bool:
    """Whether left padding has no effect on a cache layer.

    The state of a recurrent layer is correct only if the model family zeroes the inputs at padding. A cache layer that the family defines
    itself may sum over positions, including padding; it counts as affected.
    """
    if hasattr(layer, "recurrent_states"):
        code = sys.modules[family_of(model).__module__]
        return any(hasattr(code, name) for name in ("apply_mask_to_padding_states", "create_recurrent_attention_mask"))
    return type(layer).__module__ == DynamicLayer.__module__


def _attends_by_distance(model: TransformersModel) -> bool:
    """Whether ``model`` uses ALiBi instead of position ids. Its bias depends on the distance of two tokens; padding does not change it."""
    return any("alibi" in name for module in model.modules() for name in vars(type(module)))


def _numbers_tokens_itself(model: TransformersModel) -> bool:
    """Whether ``model`` computes position ids from the tokens, as RoBERTa does: they start at ``pad_token_id + 1`` and skip pad tokens.

    A forward pass over one new token cannot know how many pad tokens came before it. So such a model must read the full text at every step.
    """
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())

"""Which attention a model computes with: the fastest that its class supports and that computes what its config says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stages.errors import ModelError
from stages.process.packages import missing_attention_package

if TYPE_CHECKING:
    from stages.config import ModelInput

SCORE_CAPS = ("attn_logit_softcapping", "attention_logit_softcapping", "attn_logit_softcap")
"""Config fields that cap attention scores. PyTorch's scaled_dot_product_attention has no such cap."""


EAGER_ADDS_ALIBI_TWICE = "the eager attention of Falcon in this version of transformers adds the ALiBi bias twice"


def attention_of(auto: Any, config: Any, model: ModelInput, dtype: torch.dtype) -> str | None:
    """The ``attn_implementation`` for the class that ``auto`` picks for ``config``; None lets transformers choose sdpa or else eager.

    Raises ModelError where ``model.attention`` names one that the class does not support, or whose package or device is missing. A class
    that comes with the model (``trust_remote_code``) is not known yet here; transformers then refuses what it does not support.
    """
    found = class_of(auto, config)
    if model.attention == "auto":
        return _fastest(found, config, dtype)
    if reason := _refusal(model.attention, found, config):
        raise ModelError(f"attention: {model.attention} cannot be used for {model.ref!r}: {reason}. Write attention: auto")
    return model.attention


def class_of(auto: Any, config: Any) -> Any:
    """The class that ``auto`` makes of ``config``; None where transformers has none, or the code comes with the model."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        return None
    if not isinstance(found, tuple):
        return found
    named = set(getattr(config, "architectures", None) or ())
    return next((one for one in found if one.__name__ in named), found[0])


def _fastest(found: Any, config: Any, dtype: torch.dtype) -> str | None:
    if found is None or (found._supports_sdpa and not caps_scores(config)):
        return None
    is_half = dtype in (torch.float16, torch.bfloat16)  # flash attention computes in no other precision
    return "flash_attention_2" if is_half and not _refusal("flash_attention_2", found, config) else "eager"


def caps_scores(config: Any) -> bool:
    """Whether the model caps its attention scores, as Gemma 2 does: cap * tanh(score / cap)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in SCORE_CAPS)


def _refusal(attention: str, found: Any, config: Any) -> str:
    """Why ``attention`` cannot be used, in a clause; empty where it can."""
    name = found.__name__ if found is not None else "a class of the model's own"
    if attention == "eager":
        return EAGER_ADDS_ALIBI_TWICE if config.model_type == "falcon" and getattr(config, "alibi", False) else ""
    if attention == "sdpa":
        if found is not None and not found._supports_sdpa:
            return f"{name} does not support sdpa"
        return f"{name} caps its attention scores, which sdpa cannot" if caps_scores(config) else ""
    if attention == "flex_attention":
        return "" if found is None or found._supports_flex_attn else f"{name} does not support flex_attention"
    if found is not None and not found._supports_flash_attn:
        return f"{name} does not support flash attention"
    return missing_attention_package(attention) or _unfit_device(attention, found)


def _unfit_device(attention: str, found: Any) -> str:
    if "/" in attention:
        return ""  # a kernel of the hub may be for any device
    if not torch.cuda.is_available():
        return "it needs a GPU, and there is none"
    fitting = getattr(found, "_compatible_flash_implementations", None)
    if fitting and attention not in fitting:
        return f"{found.__name__} works with {' or '.join(fitting)} alone"
    return ""

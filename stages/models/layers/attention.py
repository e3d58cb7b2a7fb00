"""Select the attention implementation of a model: the fastest one that its class supports and that follows its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.errors import ModelError
from stages.process.packages import missing_attention_package

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from stages.config import ModelInput
    from stages.model_types import AutoClass

SCORE_CAPS = ("attn_logit_softcapping", "attention_logit_softcapping", "attn_logit_softcap")
"""Config fields that cap attention scores. PyTorch's scaled_dot_product_attention has no such cap."""


EAGER_ADDS_ALIBI_TWICE = "the eager attention of Falcon in this version of transformers adds the ALiBi bias twice"


def attention_of(auto: AutoClass, config: PretrainedConfig, model: ModelInput, dtype: torch.dtype) -> str | None:
    """The ``attn_implementation`` for the class that ``auto`` selects; None lets transformers choose sdpa, or eager if it is unsupported.

    Raises ModelError if ``model.attention`` is not supported by the class, or if its package or device is missing. The class of a model
    with remote code is not known here; transformers then checks the choice itself.
    """
    model_class = class_of(auto, config)
    if model.attention == "auto":
        return _fastest(model_class, config, dtype)
    if reason := _refusal(model.attention, model_class, config):
        raise ModelError(f"attention: {model.attention} cannot be used for {model.ref!r}: {reason}. Write attention: auto")
    return model.attention


def class_of(auto: AutoClass, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that ``auto`` selects for ``config``; None if transformers has none, or for remote code."""
    mapping = auto._model_mapping
    assert mapping is not None, "auto is one of the classes for a task"
    try:
        model_class = mapping[type(config)]
    except KeyError:
        return None
    if not isinstance(model_class, tuple):
        return model_class
    named = set(getattr(config, "architectures", None) or ())
    return next((one for one in model_class if one.__name__ in named), model_class[0])


def _fastest(model_class: type[PreTrainedModel] | None, config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    if model_class is None or (model_class._supports_sdpa and not caps_scores(config)):
        return None
    is_half = dtype in (torch.float16, torch.bfloat16)  # flash attention supports only these dtypes
    return "flash_attention_2" if is_half and not _refusal("flash_attention_2", model_class, config) else "eager"


def caps_scores(config: PretrainedConfig) -> bool:
    """Whether the model caps its attention scores, as Gemma 2 does: cap * tanh(score / cap)."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in SCORE_CAPS)


def _refusal(attention: str, model_class: type[PreTrainedModel] | None, config: PretrainedConfig) -> str:
    """The reason why ``attention`` cannot be used; empty if it can."""
    name = model_class.__name__ if model_class is not None else "the model's own class"
    if attention == "eager":
        return EAGER_ADDS_ALIBI_TWICE if config.model_type == "falcon" and getattr(config, "alibi", False) else ""
    if attention == "sdpa":
        if model_class is not None and not model_class._supports_sdpa:
            return f"{name} does not support sdpa"
        return f"{name} caps its attention scores, which sdpa cannot do" if caps_scores(config) else ""
    if attention == "flex_attention":
        return "" if model_class is None or model_class._supports_flex_attn else f"{name} does not support flex_attention"
    if model_class is not None and not model_class._supports_flash_attn:
        return f"{name} does not support flash attention"
    return missing_attention_package(attention) or _unfit_device(attention, model_class)


def _unfit_device(attention: str, model_class: type[PreTrainedModel] | None) -> str:
    if "/" in attention:
        return ""  # a Hub kernel may support any device
    if not torch.cuda.is_available():
        return "it needs a GPU, and there is none"
    fitting = getattr(model_class, "_compatible_flash_implementations", None)
    if model_class is not None and fitting and attention not in fitting:
        return f"{model_class.__name__} supports only {' or '.join(fitting)}"
    return ""

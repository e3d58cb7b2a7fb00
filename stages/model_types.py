"""Types of models from transformers and peft. Other modules import them for the type checker only."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

TransformersModel: TypeAlias = "PreTrainedModel | PeftModel"
"""A model of transformers, possibly wrapped by peft. ``sampling.support.plain_model`` returns the model inside the wrapper."""

AutoClass: TypeAlias = "type[_BaseAutoModelClass]"
"""A class such as ``AutoModelForCausalLM``, which selects the model class for a config."""

"""Randomly initialized models from a recipe's ``architecture`` block."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.layers.attention import attention_of
from stages.models.layers.replacing import use_own_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.model_types import AutoClass


def random_model(
    auto: AutoClass, architecture: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, **options: object
) -> PreTrainedModel:
    """Create a model from ``{type: llama, hidden_size: 128, ...}`` in the class that ``auto`` selects, in fp32, with one row per token.

    ``options`` are additional config fields, such as labels. Raises ModelError for a type or field that transformers does not know.
    """
    fields = dict(architecture)
    kind = str(fields.pop("type"))
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=3)
        raise ModelError(f"architecture.type={kind!r} is unknown; {'did you mean ' + ' or '.join(near) if near else 'try llama or gpt2'}")
    known = {*CONFIG_MAPPING[kind]().to_dict(), *CONFIG_MAPPING[kind].attribute_map}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise ModelError(f"architecture.{name} is not a field of {kind}" + (f"; did you mean {near[0]}?" if near else ""))
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        config = CONFIG_MAPPING[kind](**{**special, **fields, **options, "vocab_size": len(tokenizer)})
        attention = attention_of(auto, config, ModelInput(ref=kind), torch.float32)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        what = auto.__name__.removeprefix("AutoModelFor")
        raise ModelError(f"cannot create a {kind} model ({what}) from architecture {architecture}: {reason}") from error
    use_own_layers(model)
    return model

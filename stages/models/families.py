"""What families of models cannot do here, refused in one sentence before their weights are read. docs/families.md is the table of it."""

from __future__ import annotations

from typing import Any

from stages.errors import ModelError


def refuse_unfit(config: Any, name: str) -> None:
    """Raise ModelError where a model of ``config`` is no causal language model, which policies, reward models and value networks are.

    ``name``: the model as the recipe writes it. A model whose code comes with it counts as what its ``auto_map`` says it is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} is a {kind} model, an encoder with a decoder; this project trains decoders alone (llama, gpt2, qwen2, ...). "
            "Name a causal language model"
        )
    reads_backwards = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and reads_backwards
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_encoder or not is_causal:
        raise ModelError(
            f"{name!r} is a {kind} model; a policy or a scalar head needs a causal language model (llama, gpt2, gpt_neox, qwen2, ...). "
            "An encoder can be trained as a classifier (stage: sentiment) and rewarded by its label"
        )

"""Unsupported features of model families, refused with one message before weights are loaded. See the table in docs/families.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from stages.model_types import AutoClass


def refuse_unfit(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError unless ``config`` belongs to a causal language model, as policies, reward models and value networks need.

    ``name``: the model as written in the recipe. A model with remote code is judged by its ``auto_map``.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} is a {kind} model, an encoder-decoder; this project trains only decoders (llama, gpt2, qwen2, ...). "
            "Use a causal language model"
        )
    reads_backwards = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and reads_backwards
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_encoder or not is_causal:
        raise ModelError(
            f"{name!r} is a {kind} model; a policy or a scalar head needs a causal language model (llama, gpt2, gpt_neox, qwen2, ...). "
            "An encoder can be trained as a classifier (stage: sentiment), whose label can be a reward"
        )


def refuse_quantization(config: PretrainedConfig, quantization: str, name: str) -> None:
    """Raise ModelError for a family whose class does not support weights of ``quantization``."""
    if config.model_type == "rwkv" and quantization == "nf4":
        raise ModelError(f"{name!r} is an rwkv model, whose class cannot rescale nf4 weights; write quantization: int8 or none")


def refuse_without_linear_layers(auto: AutoClass, config: PretrainedConfig, quantization: str, name: str) -> None:
    """Raise ModelError if bitsandbytes would quantize none of the layers of the class that ``auto`` selects. Allocates no weights."""
    with torch.device("meta"):
        made = auto.from_config(config)
    head = made.get_output_embeddings() if hasattr(made, "get_output_embeddings") else None
    if not any(type(module) in (nn.Linear, Conv1D) for module in made.modules() if module is not head):
        raise ModelError(no_linear_layers(type(made).__name__, quantization, name))


def no_linear_layers(kind: str, quantization: str, name: str) -> str:
    """The message about a class ``kind`` without plain linear layers."""
    return (
        f"quantization: {quantization} affects no layer of {name!r}: bitsandbytes quantizes only plain linear layers, and {kind} has none. "
        "Write quantization: none"
    )


def state_space_products(model: nn.Module) -> list[str]:
    """Names of linear modules inside state-space mixers (Mamba, Jamba, Bamba, Falcon-H1) that support neither adapters nor quantization.

    Fused kernels or the family's code read their weights directly, so a wrapper around the module would be ignored silently. ``in_proj`` is
    always called as a module, so it is not in this list.
    """
    names = []
    for name, module in model.named_modules():
        if "A_log" in module._parameters:
            names += [f"{name}.{own}" for own, child in module.named_children() if isinstance(child, nn.Linear) and own != "in_proj"]
    return names


def unquantized_modules(auto: AutoClass, config: PretrainedConfig) -> list[str] | None:
    """Modules of the class that ``auto`` selects which must not be quantized; None for transformers' default.

    These are the products of state-space mixers, and all layers of a classifier's head (transformers leaves out only the last one), because
    a new head is trained completely.
    """
    text = config.get_text_config()
    is_classifier = auto is AutoModelForSequenceClassification and not getattr(config, "auto_map", None)
    if not is_classifier and not any(hasattr(text, field) for field in ("mamba_d_state", "state_size", "mamba_state_dim")):
        return None
    with torch.device("meta"):
        made = auto.from_config(config)
    products = state_space_products(made)
    head = [name for name, _ in made.named_children() if name != made.base_model_prefix] if is_classifier else []
    kept = [*products, *head, *([".*pooler"] if head else [])]
    return list(dict.fromkeys([*get_keys_to_not_convert(made), *kept])) if kept else None


def quantized_modules(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """The linear modules of an unquantized model that bitsandbytes quantizes when the model is loaded.

    transformers leaves out the output layer, tied weights, the last module, and what the class keeps in fp32.
    """
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    left_out += state_space_products(model)
    return [
        module
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, left_out)
    ]

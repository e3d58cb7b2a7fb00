"""Unsupported features of model families, refused with one message before weights are loaded. See the table in docs/families.md."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.errors import ModelError
from stages.models.layers.attention import class_of
from stages.sampling.support import PASS_FAILURES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from stages.model_types import AutoClass


def refuse_unfit(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError unless ``config`` belongs to a causal language model, as policies, reward models and value networks need.

    ``name``: the model as written in the recipe. A model with remote code is judged by its ``auto_map``.
    """
    kind = config.model_type
    is_classifier = any(saved.endswith("ForSequenceClassification") for saved in config.architectures or ())
    as_reward = "To use this classifier as a reward, set label to the class whose score is the reward" if is_classifier else ""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} is a {kind} model, an encoder-decoder; this project trains only decoders (llama, gpt2, qwen2, ...). "
            f"{as_reward or 'Use a causal language model'}"
        )
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_encoder(config) or not is_causal:
        raise ModelError(
            f"{name!r} is a {kind} model; a policy or a scalar head needs a causal language model (llama, gpt2, gpt_neox, qwen2, ...). "
            f"{as_reward or 'An encoder can be trained as a classifier (stage: sentiment), whose label can be a reward'}"
        )
    if kind == "reformer" and config.axial_pos_embds:
        raise ModelError(
            f"{name!r} is a reformer model, which trains only on rows of {math.prod(config.axial_pos_shape)} tokens "
            "(axial_pos_shape in its config). Use another model"
        )
    part = text_part(config)
    if part is not None and part not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{name!r} is a {kind} model. transformers loads only its text part as a language model, and cannot load that part ({part}) "
            "again after it is saved. Use a model for text"
        )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether ``config`` belongs to an encoder, whose tokens also attend to later ones: one of masked language models, unless it says that
    it is a decoder."""
    reads_backwards = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and reads_backwards


def text_part(config: PretrainedConfig) -> str | None:
    """The model type of what the class of causal language models loads of a model for several inputs; None if it loads all of it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded = kind.config_class
    return None if loaded is None or isinstance(config, loaded) else str(loaded.model_type)


def refuse_without_classes(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError if transformers has no sequence classifier of the family. A model with remote code is not judged."""
    if class_of(AutoModelForSequenceClassification, config) is None and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, of which transformers has no sequence classifier. "
            "Use another family (bert, llama, ...)"
        )


def refuse_scalar_head(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError if a causal language model cannot have a scalar head, as reward models and value networks need.

    Allocates no weights. A model with remote code is not judged.
    """
    kind = class_of(AutoModel, config)
    other = "Use another model, or PPO with a reward function and advantages: rloo"
    if kind is None:
        if not getattr(config, "auto_map", None):
            raise ModelError(
                f"{name!r} is a {config.model_type} model, which transformers has only with its output layer. A reward model or a value "
                f"network cannot be made from it. {other}"
            )
        return
    if text_part(config) is not None and kind.__name__.endswith("ForConditionalGeneration"):  # Llama 4
        raise ModelError(
            f"{name!r}: transformers cannot load its text part without its output layer ({kind.__name__}). Train it by a step with "
            "stage: sft, which publishes the text part, and start from that"
        )
    parts: set[str] = set()
    with suppress(*PASS_FAILURES), torch.device("meta"):
        parts = {part for part, _ in kind(config).named_children()}
    if {"encoder", "decoder"} <= parts:
        raise ModelError(
            f"{name!r} is the decoder of an encoder-decoder. A reward model or a value network cannot be made from it, because "
            f"{kind.__name__} also has an encoder. {other}"
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


def unfit_products(model: nn.Module) -> list[str]:
    """Names of linear modules of ``model`` that support neither adapters nor quantization.

    The products of state-space mixers (Mamba, Jamba, Bamba, Falcon-H1), because fused kernels read their weights. Modules whose weight the
    family's code reads itself (Gemma 3n, LongCat, MobileBERT): a wrapper around the module would be ignored silently. Linear classes that
    return more than their product, such as the routers of Llama 4 and PhiMoE. Modules of several layers with one weight (Zamba), because
    each of their adapters would be merged into it.
    """
    names = []
    users = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    returns_more: dict[type[nn.Module], bool] = {}
    for name, module in model.named_modules():
        family: Any = type(module)  # Any, because mypy takes classes of modules for unhashable
        # Bloom reads weights only with slow_but_exact.
        inside = frozenset() if getattr(module, "slow_but_exact", None) is False else _read_directly(family)
        # Linear attention (Qwen3-Next, Kimi) has A_log, too, but no in_proj. It calls all its products as modules.
        is_mixer = "A_log" in module._parameters and hasattr(module, "in_proj")
        for own, child in module.named_children():
            if not isinstance(child, nn.Linear):
                continue
            kind = type(child)
            if kind not in returns_more:
                returns_more[kind] = _returns_more(child)
            # Mixers always call in_proj as a module.
            if own in inside or (is_mixer and own != "in_proj") or returns_more[kind] or users[id(child.weight)] > 1:
                names.append(f"{name}.{own}" if name else own)
    return names


_WEIGHT_OF_PART = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b|\s*=[^=])")
_READ_IN_OTHER_USES = frozenset({"DisentangledSelfAttention"})
"""Classes that read a weight only for an argument that classifiers and language models never pass."""


@cache
def _read_directly(kind: type[nn.Module]) -> frozenset[str]:
    """The parts of a module class whose weights its methods read, by the source of these methods."""
    names: set[str] = set()
    for one in kind.__mro__:
        if one is nn.Module:
            break
        if one.__name__ in _READ_IN_OTHER_USES or one.__module__.startswith("peft."):  # the layers of peft stand for those of the family
            continue
        for name, method in vars(one).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if inspect.isfunction(method) else None
            if name != "__init__" and code is not None and "weight" in code.co_names:
                with suppress(OSError, TypeError):  # a class that was made at run time has no source
                    names |= set(_WEIGHT_OF_PART.findall(inspect.getsource(code)))
    return frozenset(names)


@torch.no_grad()
def _returns_more(layer: nn.Linear) -> bool:
    """Whether a class of linear layers with its own forward pass returns something else than x W^T + b."""
    own = type(layer).forward
    if own is nn.Linear.forward or layer.weight.is_meta or not layer.weight.is_floating_point():
        return False  # on the meta device only plain layers matter: bitsandbytes quantizes no others
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device).reshape(2, -1).to(layer.weight.dtype)
    expected = functional.linear(x, layer.weight, layer.bias)
    try:
        made: object = layer(x)
    except PASS_FAILURES:
        return True
    if not isinstance(made, torch.Tensor) or made.shape != expected.shape:
        return True
    return not torch.allclose(made.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.float().abs().max()))


def unquantized_modules(auto: AutoClass, config: PretrainedConfig) -> list[str] | None:
    """Modules of the class that ``auto`` selects which must not be quantized; None for transformers' default.

    These are ``unfit_products``, and all layers of a classifier's head (transformers leaves out only the last one), because a new head is
    trained completely.
    """
    if class_of(auto, config) is None:
        return None
    with torch.device("meta"):
        made = auto.from_config(config)
    is_classifier = auto is AutoModelForSequenceClassification and not getattr(config, "auto_map", None)
    head = [name for name, _ in made.named_children() if name != made.base_model_prefix] if is_classifier else []
    kept = [*unfit_products(made), *head, *([".*pooler"] if head else [])]
    return list(dict.fromkeys([*get_keys_to_not_convert(made), *kept])) if kept else None


def quantized_modules(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """The linear modules of an unquantized model that bitsandbytes quantizes when the model is loaded.

    transformers leaves out the output layer, tied weights, the last module, and what the class keeps in fp32.
    """
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    left_out += unfit_products(model)
    return [
        module
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, left_out)
    ]

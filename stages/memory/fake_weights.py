"""Count the weights of a model by making it on the meta device, where tensors have a shape but no memory."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from stages.memory.fake_passes import config_of
from stages.memory.passes import PassKind
from stages.memory.weights import ModelWeights
from stages.models.families import state_space_products


def weights_of(kind: PassKind) -> ModelWeights:
    """The weights of the causal language model of ``kind``; of an encoder those of its transformer. Raises the errors of the model's code.

    Linear modules that support neither adapters nor quantization count as other weights.
    """
    config = config_of(kind, vocab_size=kind.vocabulary)
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    with torch.device("meta"):
        model = (AutoModelForCausalLM if is_causal else AutoModel).from_config(config)
    transformer = model.base_model
    without = set(state_space_products(transformer))
    matrices = [
        module.weight for name, module in transformer.named_modules() if type(module) in (nn.Linear, Conv1D) and name not in without
    ]
    linear = sum(matrix.numel() for matrix in matrices)
    inner = sum(parameter.numel() for parameter in transformer.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return ModelWeights(linear, inner - linear, everything - inner, sum(sum(matrix.shape) for matrix in matrices))

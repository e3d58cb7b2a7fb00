"""Count the weights of a model and of an adapter by making them on the meta device, where tensors have a shape but no memory."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from stages.errors import ModelError
from stages.memory.fake_passes import WHOLE, are_alike, config_of, full_model, quantize, text_config_of
from stages.memory.passes import Adapter, PassKind, Task
from stages.memory.weights import SMALL, AdapterWeights, ModelWeights, Quantizable
from stages.models.adapters.activation import activate, adapted, is_part_of
from stages.models.adapters.attaching import add_adapter, attach_lora
from stages.models.adapters.variants import Started
from stages.models.families import is_encoder, quantized_modules
from stages.models.loading import as_resolved
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

NAME = "count"  # of the adapter


def weights_of(kind: PassKind) -> ModelWeights:
    """The weights of the model of ``kind``; of an encoder those of its transformer, or of a classifier. Raises the errors of the model's
    code.

    Linear modules that bitsandbytes does not quantize count as other weights.
    """
    config = config_of(kind)
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder(config)
    if kind.task == "CAUSAL_LM" and not is_causal:
        kind = replace(kind, task="FEATURE_EXTRACTION")
    model = plain_model(full_model(kind))
    transformer = model.base_model
    assert isinstance(transformer, PreTrainedModel)
    quantized = quantized_modules(transformer if kind.task == "SEQ_CLS" else model)  # the head of a classifier is not quantized
    sizes = [_size_of(module) for module in quantized]
    linear = sum(rows * columns for rows, columns in sizes)
    inner = sum(parameter.numel() for parameter in transformer.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return ModelWeights(linear, inner - linear, everything - inner, Quantizable.of(sizes))


def _size_of(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(output features, input features)."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def adapter_of(kind: PassKind) -> AdapterWeights:
    """The weights of the adapter of ``kind``, added to a model of its class. Raises the errors of the model's code.

    If all layers are alike, two and three layers are enough: the third layer has the same weights as each further one.
    """
    assert kind.adapter is not None
    layers: int = text_config_of(kind).num_hidden_layers
    if layers <= WHOLE or kind.adapter.may_differ_by_layer or not are_alike(kind, layers):
        return _adapter_with(kind, layers)
    two, three = (_adapter_with(kind, number) for number in (2, 3))
    numbers = ((getattr(two, name), getattr(three, name)) for name in ("weights", "small", "start"))
    weights, small, start = (less + (layers - 2) * (more - less) for less, more in numbers)
    return replace(two, weights=weights, small=small, start=start)


def _adapter_with(kind: PassKind, layers: int) -> AdapterWeights:
    assert kind.adapter is not None
    model: TransformersModel = full_model(kind, layers)
    if kind.quantization != "none":
        quantize(model, kind.quantization, kind.device)
    model.requires_grad_(False)
    try:
        with torch.device("meta"):
            model = attach_lora(model, kind.adapter.settings, task=kind.task, base="count", name=NAME, new_rows=kind.trained_rows)
    except ModelError as error:
        return AdapterWeights(0, unfit=str(error))
    own = [parameter.numel() for name, parameter in model.named_parameters() if is_part_of(name, NAME) and parameter.requires_grad]
    output = plain_model(adapted(model)).get_output_embeddings()
    of_output = [] if output is None else [one.numel() for name, one in output.named_parameters() if is_part_of(name, NAME)]
    start = sum(buffer.numel() for module in model.modules() if isinstance(module, Started) for buffer in module.buffers())
    return AdapterWeights(sum(own), sum(of_output), sum(number for number in own if number < SMALL), start)


def stacks_of(kind: PassKind) -> dict[str, str]:
    """Put the adapters of ``kind.stacks`` on a model of its class, as a step loads them, and read back those that steps will make.

    Returns ``unfit``: why that is impossible; empty if it is possible. Raises the errors of the model's code.
    """
    model: TransformersModel = full_model(kind)
    if kind.quantization != "none":
        quantize(model, kind.quantization, kind.device)
    model.requires_grad_(False)
    names: dict[str, str] = {}
    try:
        for stack in kind.stacks:
            below: list[str] = []
            for form in stack:
                if hasattr(model, "peft_config"):
                    activate(adapted(model), below)
                if form not in names:
                    names[form] = f"{NAME}-{len(names)}"
                    with torch.device("meta"):
                        rows = () if below else kind.trained_rows
                        model = _with_form(model, form, names[form], kind.task, rows, is_shared=len(kind.stacks) > 1)
                if names[form] in model.peft_config:
                    below.append(names[form])
    except ModelError as error:
        return {"unfit": str(error)}
    return {"unfit": ""}


def _with_form(
    model: TransformersModel, form: str, name: str, task: Task, new_rows: Collection[int], *, is_shared: bool
) -> TransformersModel:
    if not form.startswith("["):
        return add_adapter(model, as_resolved(form), name, is_shared=is_shared)
    step, content = json.loads(form)
    return attach_lora(model, Adapter(content).settings, task=task, base=step, name=name, new_rows=new_rows)
